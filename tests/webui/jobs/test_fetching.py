"""Fetching the published preference model as a job, over a stand-in for the WebUI; nothing is fetched."""

from __future__ import annotations

import threading

import pytest

from spo.errors import SpoError
from spo.preference.download import RemoteFile
from spo.webui import folders
from spo.webui.jobs import fetching, job
from tests.webui import stand_in

webui = stand_in.webui
REMOTE = RemoteFile("published.bin", "http://hub/published.bin", 4_000_000_000, "0" * 64)


@pytest.fixture
def asked(webui, monkeypatch):
    """What the hub was asked for: (architecture, folder)."""
    asked = []

    def find(architecture, folder):
        asked.append((architecture, folder))
        return REMOTE

    monkeypatch.setattr(fetching, "find_published", find)
    monkeypatch.setattr(fetching, "in_half", lambda path: path)
    monkeypatch.setattr(fetching, "_current", None)
    monkeypatch.setattr(fetching, "_thread", None)
    return asked


def ended(started):
    fetching._thread.join(10)
    assert not fetching._thread.is_alive()
    return started


@pytest.mark.parametrize("architecture", ["sd15", "sdxl"])
def test_the_model_is_that_of_the_loaded_checkpoint(asked, webui, monkeypatch, architecture):
    webui.sd_models.model_data.sd_model.is_sdxl = architecture == "sdxl"
    monkeypatch.setattr(fetching, "download", lambda remote, folder, progress, should_stop: folder / remote.name)
    ended(fetching.start_fetching())
    assert asked == [(architecture, folders.preference_folder())]


def test_it_goes_on_beside_other_work_and_once_at_a_time(asked, webui, monkeypatch):
    release = threading.Event()
    monkeypatch.setattr(fetching, "download", lambda remote, folder, **others: release.wait(10) and folder / "x.bin")
    fetching.start_fetching()
    with pytest.raises(job.BusyError, match="being downloaded already"):
        fetching.start_fetching()
    trained = job.start("training", "vivid", lambda mine: None)
    job._thread.join(10)
    assert trained.phase == "finished" and fetching.current().live
    release.set()
    assert ended(fetching.current()).phase == "finished"
    with pytest.raises(SpoError, match="Nothing is being downloaded"):
        fetching.stop()


def test_progress_and_the_twin(asked, monkeypatch):
    seen, halved = [], []

    def download(remote, folder, progress, should_stop):
        assert folder.is_dir() and not should_stop()
        progress(1_000_000_000, remote.size_bytes)
        seen.append((fetching.current().phase, fetching.current().fraction, fetching.current().message))
        return folder / remote.name

    monkeypatch.setattr(fetching, "download", download)
    monkeypatch.setattr(fetching, "in_half", halved.append)
    finished = ended(fetching.start_fetching())
    assert seen == [("working", 0.25, "1.00 GB of 4.00 GB.")]
    assert halved == [folders.preference_folder() / "published.bin"]
    assert (finished.kind, finished.name, finished.phase) == ("download", "published.bin", "finished")
    assert "published.bin is in models/SPO" in finished.message


def test_stop_reaches_the_download_and_its_end_the_user(asked, monkeypatch):
    def download(remote, folder, progress, should_stop):
        fetching.stop()
        assert should_stop()
        raise SpoError("stopped at 1 GB.")

    monkeypatch.setattr(fetching, "download", download)
    stopped = ended(fetching.start_fetching())
    assert (stopped.phase, stopped.message) == ("stopped", "stopped at 1 GB.")

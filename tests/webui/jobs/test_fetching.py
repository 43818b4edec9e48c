"""Fetching the published preference model as a job, over a stand-in for the WebUI; nothing is fetched."""

from __future__ import annotations

from types import SimpleNamespace

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
    return asked


class FrozenCLIPEmbedder:
    """SDXL's base has it, its refiner has not: told by the name of the class."""


def ended(started):
    job._thread.join(10)
    assert not job._thread.is_alive()
    return started


@pytest.mark.parametrize("architecture", ["sd15", "sdxl"])
def test_the_model_is_that_of_the_loaded_checkpoint(asked, webui, architecture):
    webui.sd_models.model_data.sd_model.is_sdxl = architecture == "sdxl"
    webui.sd_models.model_data.sd_model.conditioner = SimpleNamespace(embedders=[FrozenCLIPEmbedder()])
    assert fetching.published() == REMOTE
    assert asked == [(architecture, folders.preference_folder())]


def test_progress_and_the_twin(asked, monkeypatch):
    seen, halved = [], []

    def download(remote, folder, progress, should_stop):
        assert folder.is_dir() and not should_stop()
        progress(1_000_000_000, remote.size_bytes)
        seen.append((job.current().phase, job.current().fraction, job.current().message))
        return folder / remote.name

    monkeypatch.setattr(fetching, "download", download)
    monkeypatch.setattr(fetching, "in_half", halved.append)
    finished = ended(fetching.start_fetching())
    assert seen == [("working", 0.25, "1.00 of 4.00 GB.")]
    assert halved == [folders.preference_folder() / "published.bin"]
    assert (finished.kind, finished.name, finished.phase) == ("download", "published.bin", "finished")
    assert "published.bin is in models/SPO" in finished.message


def test_stop_reaches_the_download_and_its_end_the_user(asked, monkeypatch):
    def download(remote, folder, progress, should_stop):
        job.stop("save")
        assert should_stop()
        raise SpoError("stopped at 1 GB.")

    monkeypatch.setattr(fetching, "download", download)
    failed = ended(fetching.start_fetching())
    assert (failed.phase, failed.message) == ("failed", "stopped at 1 GB.")

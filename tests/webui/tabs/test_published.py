"""The published model's download from the tab: begun, stopped, and refused in words."""

from __future__ import annotations

import threading

import pytest

pytest.importorskip("gradio")

from spo.errors import SpoError
from spo.webui.jobs import fetching
from spo.webui.tabs import page, published
from tests.webui import stand_in

webui = stand_in.webui


def test_begun_and_stopped(webui, monkeypatch):
    monkeypatch.setattr(fetching, "_current", None)
    monkeypatch.setattr(fetching, "_thread", None)
    assert "Nothing is being downloaded" in page.with_errors(published._stop)()
    asked = threading.Event()

    def fetch(job, architecture):
        while not job.stop_wanted:
            asked.wait(0.01)
        raise SpoError("stopped")

    monkeypatch.setattr(fetching, "_fetch", fetch)
    assert published._fetch() == ""
    assert "being downloaded already" in page.with_errors(published._fetch)()
    assert published._stop() == ""
    fetching._thread.join(10)
    assert not fetching.current().live

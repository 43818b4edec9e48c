"""One job at a time, and how jobs end, over a stand-in for the WebUI."""

from __future__ import annotations

import threading

import pytest

from spo.errors import SpoError
from spo.webui.jobs import job
from tests.webui import stand_in

webui = stand_in.webui


def test_one_job_at_a_time_and_how_jobs_end(webui):
    release = threading.Event()
    first = job.start("training", "first", lambda mine: release.wait(10))
    with pytest.raises(job.BusyError, match='"first" is still going on'):
        job.start("training", "second", lambda mine: None)
    release.set()
    job.end()
    assert first.phase == "finished"

    def fails(mine):
        raise SpoError("It cannot work.")

    def breaks(mine):
        raise KeyError("x")

    def waits(mine):
        release.clear()
        while not mine.asked_to_stop():
            release.wait(0.01)
        mine.phase = "stopped"

    def end_of(work):
        started = job.start("training", "one", work)
        job._thread.join(10)
        return started

    assert (end_of(fails).phase, job.current().message) == ("failed", "It cannot work.")
    assert end_of(breaks).message.startswith("KeyError")
    for how in ("save", "now"):
        started = job.start("training", "one", waits)
        job.stop(how)
        job._thread.join(10)
        assert started.phase == "stopped"
    with pytest.raises(SpoError, match="Nothing is going on"):
        job.stop("save")
    with pytest.raises(SpoError, match="accepted are save and now"):
        job.stop("later")


def test_a_file_that_cannot_be_written_is_named(webui):
    def fills_the_disk(mine):
        raise OSError(28, "No space left on device", "/runs/vivid.spo/metrics.csv")

    started = job.start("training", "one", fills_the_disk)
    job._thread.join(10)
    assert started.phase == "failed"
    assert started.message.startswith('"metrics.csv" could not be read or written: No space left on device.')
    assert "resume" in started.message

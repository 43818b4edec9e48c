"""A watcher of whom nothing is asked does nothing."""

from __future__ import annotations

from spo.progress import Progress, StopRequested, Watcher


def test_everything_is_optional(tmp_path):
    watcher = Watcher()
    assert watcher.progress(Progress("training", 1, 0, 0.5, None, {})) is None
    assert not watcher.should_stop()
    assert not watcher.sample_now()
    assert watcher.log("text") is None
    assert watcher.saved(tmp_path) is None


def test_a_stop_is_no_error_of_the_users():
    assert issubclass(StopRequested, Exception)
    assert StopRequested.__mro__[1] is Exception

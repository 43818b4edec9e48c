"""The bar, and what signals do while it is there."""

from __future__ import annotations

import os
import signal

import pytest

from spo.cli.progress_bar import progress_bar
from spo.progress import Progress

posix = pytest.mark.skipif(os.name == "nt", reason="signals are POSIX's")


def test_the_bar_names_phase_update_metrics_and_time(capsys):
    with progress_bar() as watcher:
        watcher.progress(Progress("training", 7, 1, 0.25, 3700.0, {"preference_mean": 1.2345, "loss": 0.69}))
        watcher.log("a line")
    text = capsys.readouterr().err
    assert " 25% |" in text
    assert "training, update 7, score 1.23, 1:01:40 left" in text
    assert "a line" in text


@posix
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_signal_asks_for_an_end_and_a_second_one_ends(number, capsys):
    former = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt), progress_bar() as watcher:
        assert not watcher.should_stop()
        os.kill(os.getpid(), number)
        assert watcher.should_stop()
        assert "once more to stop at once" in capsys.readouterr().err
        os.kill(os.getpid(), number)
    assert signal.getsignal(number) is former

"""The bar in the terminal, and the signals that ask a run to end."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

from spo.cli.several import is_started
from spo.progress import Progress, Watcher

ONE_CTRL_C_S = 3.0  # of several processes each gets it from the terminal, and from the launcher
METRICS = {"preference_mean": "score", "kept_share": "kept"}  # a metric's column -> its name beside the bar


@contextmanager
def progress_bar(index: int = 0) -> Iterator[Watcher]:
    """A watcher that draws a bar with ETA; Ctrl-C and SIGTERM mean "save and end", a second one ends at once.

    index  of this process among several: the others than 0 draw nothing, and say who says what they log
    """
    asked: float | None = None
    one_s = ONE_CTRL_C_S if is_started() else 0.0
    bar = tqdm(total=1.0, bar_format="{percentage:3.0f}% |{bar:24}| {desc}", file=sys.stderr, disable=index > 0)

    def ask(number: int, frame: object) -> None:
        nonlocal asked
        if asked is not None:
            if time.monotonic() - asked > one_s:
                raise KeyboardInterrupt
            return
        asked = time.monotonic()
        if index == 0:
            bar.write("Stopping after this step; once more to stop at once.", file=sys.stderr)

    def draw(progress: Progress) -> None:
        parts = [f"{progress.phase}, update {progress.step}"]
        parts += [f"{name} {progress.metrics[key]:.3g}" for key, name in METRICS.items() if key in progress.metrics]
        if progress.eta_s is not None:
            parts.append(f"{tqdm.format_interval(progress.eta_s)} left")
        bar.set_description_str(", ".join(parts), refresh=False)
        bar.n = progress.fraction
        bar.refresh()

    def log(text: str) -> None:
        bar.write(f"Process {index}: {text}" if index else text, file=sys.stderr)

    former = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield Watcher(progress=draw, should_stop=lambda: asked is not None, log=log)
    finally:
        bar.close()
        for number, handler in former.items():
            signal.signal(number, handler)

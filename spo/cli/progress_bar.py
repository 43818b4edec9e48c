"""The bar in the terminal, and the signals that ask a run to end."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

from spo.progress import Progress, Watcher

METRICS = {"preference_mean": "score", "kept_share": "kept"}  # a metric's column -> its name beside the bar


@contextmanager
def progress_bar() -> Iterator[Watcher]:
    """A watcher that draws a bar with ETA; Ctrl-C and SIGTERM mean "save and end", a second one ends at once."""
    asked = False
    bar = tqdm(total=1.0, bar_format="{percentage:3.0f}% |{bar:24}| {desc}", file=sys.stderr)

    def ask(number: int, frame: object) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        bar.write("Stopping after this step; once more to stop at once.", file=sys.stderr)

    def draw(progress: Progress) -> None:
        parts = [f"{progress.phase}, update {progress.step}"]
        parts += [f"{name} {progress.metrics[key]:.3g}" for key, name in METRICS.items() if key in progress.metrics]
        if progress.eta_s is not None:
            parts.append(f"{tqdm.format_interval(progress.eta_s)} left")
        bar.set_description_str(", ".join(parts), refresh=False)
        bar.n = progress.fraction
        bar.refresh()

    former = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield Watcher(progress=draw, should_stop=lambda: asked, log=lambda text: bar.write(text, file=sys.stderr))
    finally:
        bar.close()
        for number, handler in former.items():
            signal.signal(number, handler)

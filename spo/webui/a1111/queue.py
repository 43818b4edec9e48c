"""The WebUI's queue, its progress bar, its Interrupt and its console."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from spo.webui.a1111.options import option

TURNS = "spo_turns"  # of the WebUI's settings, and its text there
TURNS_TEXT = "While SPO trains, make other pictures between two rollouts (off: after the run)"


def new_task(kind: str) -> str:
    """The name of a task to be begun by `in_queue`; the page's script asks for its progress by it."""
    from modules import progress

    task = progress.create_task_id(kind)
    progress.add_task_to_queue(task)
    return str(task)


@contextmanager
def in_queue(job: str, task: str = "") -> Iterator[None]:
    """Wait for the WebUI's queue and hold it, so that nothing else samples meanwhile. It is not re-entrant.

    job  what the WebUI calls the work; task: of `new_task`, when the page is to follow it
    """
    from modules import call_queue, devices, progress, shared

    with call_queue.queue_lock:
        shared.state.begin(job=job)
        if task:
            progress.start_task(task)
        try:
            yield
        finally:
            if task:
                progress.finish_task(task)
            shared.state.end()
            clear_interruption()
            shared.state.skipped = False
            shared.state.textinfo = None
            devices.torch_gc()


def others_wait() -> bool:
    """Whether pages or the API wait for pictures, and by the WebUI's settings get their turn between rollouts."""
    from modules import progress

    return option(TURNS) is not False and bool(progress.pending_tasks)


def let_others_begin(limit_s: float = 10.0) -> None:
    """Right after leaving the queue: wait until one of those that wait has it, or who comes back might be first."""
    from modules import progress

    waiting, until = set(progress.pending_tasks), time.monotonic() + limit_s
    while waiting and waiting <= set(progress.pending_tasks) and time.monotonic() < until:
        time.sleep(0.02)


def interrupted() -> bool:
    """Whether the user pressed the WebUI's own Interrupt or Stop."""
    from modules import shared

    return bool(shared.state.interrupted or shared.state.stopping_generation)


def clear_interruption() -> None:
    """Forget Interrupt and Stop, so that what is sampled next is finished."""
    from modules import shared

    shared.state.interrupted = shared.state.stopping_generation = False


def show_progress(fraction: float, text: str, eta_s: float | None = None) -> None:
    """The WebUI's progress bar at fraction 0 ... 1, with its time left, which it makes of fraction and start."""
    from modules import shared

    state = shared.state
    known = fraction >= 0.01  # before that its time left would be far off
    state.job_count, state.job_no = (1000, round(fraction * 999)) if known else (0, 0)
    if eta_s is not None and 0 < fraction < 1:
        state.time_start = time.time() - eta_s * fraction / (1 - fraction)
    state.textinfo = text


def report(text: str) -> None:
    """Print a line and the traceback of the exception that is being handled into the WebUI's console."""
    from modules import errors

    errors.report(text, exc_info=True)

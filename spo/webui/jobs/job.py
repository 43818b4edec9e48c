"""One piece of work at a time on the loaded checkpoint, in a thread of its own, in the WebUI's queue.

The page and the API only start, watch and stop it: closing the browser changes nothing, and another page that is
opened shows the same work. Downloads are beside it (see `fetching`).
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from spo.errors import SpoError
from spo.webui.seam import webui

if TYPE_CHECKING:
    from PIL.Image import Image

LIVE = ("waiting", "loading", "working")


class Abandoned(Exception):  # noqa: N818 - not an error
    """Raised inside a run that is to end at once, without saving."""


@dataclass(frozen=True)
class PoolPictures:
    """One image's pool as small pictures, with scores; win, lose and parent are positions; kept: used as a pair."""

    pictures: list[Image]
    scores: list[float]
    win: int
    lose: int
    parent: int
    kept: bool
    step: int
    timestep: int
    prompt: str
    made_s: float = field(default_factory=time.time)


@dataclass(frozen=True)
class Example:
    """A picture that shows what a run does: prompt and settings for txt2img; prompts: some of the run's."""

    prompts: list[str]
    negative_prompt: str
    width: int
    height: int
    sampling_steps: int
    guidance_scale: float
    preference: str


@dataclass(frozen=True)
class StatisticsTable:
    """rows: a statistic's name, then for each column its mean and its interval, "" where none is known."""

    columns: Sequence[str]
    rows: list[tuple[str, list[tuple[str, str]]]]


@dataclass
class Job:
    """What is known of one piece of work, for pages and the API.

    phase      waiting (in the queue), loading, working; then finished, stopped or failed. `shown_phase` says
               "stopping" while a stop is wanted
    kind       "training", "preference training", "comparison" or "download"; name: the LoRA's or the grid's
    fraction   0 ... 1; eta_s None until known
    message    one sentence for the user; log: what happened on the way
    rows       of metrics so far; checks: of validation.csv
    pool       the last one shown; picture: newest sample grid or the comparison's
    first_samples  of a training run, from before its first update: the newest ones are seen below them
    statistics, page  of a comparison: its table with intervals, and the page that shows it with pictures
    example    of a training run: what to look at its LoRA with
    live_votes  of a training run: the folder of votes that its taste head is refitted to; "": none
    made_way   the work returned unfinished to let others have the queue; it is called again when its turn comes
    """

    kind: str
    name: str
    task: str
    phase: str = "waiting"
    message: str = "Waiting for the WebUI's queue."
    fraction: float = 0.0
    eta_s: float | None = None
    step: int = 0
    rows: list[dict[str, float]] = field(default_factory=list)
    checks: Sequence[Mapping[str, float]] = ()
    pool: PoolPictures | None = None
    picture: Path | None = None
    first_samples: Path | None = None
    output: Path | None = None
    example: Example | None = None
    table: str = ""
    statistics: StatisticsTable | None = None
    page: Path | None = None
    log: deque[str] = field(default_factory=lambda: deque(maxlen=200))
    version: int = 0
    looked_at_s: float = 0.0
    begun_s: float = field(default_factory=time.time)
    stop_wanted: str = ""
    live_votes: str = ""
    made_way: bool = False
    sample_wanted: bool = False

    @property
    def live(self) -> bool:
        return self.phase in LIVE

    @property
    def shown_phase(self) -> str:
        return "stopping" if self.live and self.stop_wanted else self.phase

    def say(self, text: str) -> None:
        """Put a line into the log and make it the message."""
        self.log.append(f"{time.strftime('%H:%M:%S')} {text}")
        self.show(text)

    def show(self, text: str) -> None:
        """Make it the message, not worth a line in the log."""
        self.message = text
        self.version += 1

    def asked_to_stop(self) -> bool:
        """Whether to save and end now. Raises Abandoned when it shall end without saving."""
        if self.stop_wanted == "now":
            raise Abandoned
        return bool(self.stop_wanted) or webui.interrupted()

    def take_sample_wish(self) -> bool:
        """Whether pictures are wanted, once for each wish."""
        wanted, self.sample_wanted = self.sample_wanted, False
        return wanted


_lock = threading.Lock()
_current: Job | None = None
_latest: dict[str, Job] = {}  # kind -> the last work of that kind
_thread: threading.Thread | None = None
_line: list[tuple[Job, Callable[[Job], None]]] = []  # begun one after the other when the current work has ended


def current() -> Job | None:
    """The work that is going on, or the last one."""
    return _current


def latest(*kinds: str) -> Job | None:
    """The last work of these kinds, be it over or not."""
    jobs = [_latest[kind] for kind in kinds if kind in _latest]
    return max(jobs, key=lambda job: job.begun_s) if jobs else None


def ready_checkpoint() -> webui.Checkpoint:
    """The checkpoint that work begun now would be on: the chosen one, but the loaded one while work goes on."""
    return webui.loaded_checkpoint() if _current is not None and _current.live else webui.chosen_checkpoint()


def start(kind: str, name: str, work: Callable[[Job], None], *, in_line: bool = False) -> Job:
    """Begin `work` in the WebUI's queue and return at once. Raises SpoError while other work of ours goes on.

    work     ends by returning (phase "finished" unless it set another), by SpoError or by any other exception
    in_line  while other work goes on, begin when that has ended, however it ended, and what stands in line before
    """
    with _lock:
        if _thread is None or not _thread.is_alive():
            job = Job(kind, name, webui.new_task("spo"))
            _begin(job, work)
        elif in_line:
            job = Job(kind, name, "")
            _line.append((job, work))
        else:
            assert _current is not None
            raise BusyError(f'"{_current.name}" is still going on; stop it or wait for its end.')
    return job


def _begin(job: Job, work: Callable[[Job], None]) -> None:
    global _current, _thread
    _current = _latest[job.kind] = job
    _thread = threading.Thread(target=_run_queued, args=(job, work), name=f"spo {job.kind}", daemon=True)
    _thread.start()


def in_line() -> list[str]:
    """Names of the work that waits for the current one's end, in its order."""
    with _lock:
        return [job.name for job, _ in _line]


def clear_line() -> int:
    """Nothing is begun after the current work; how many waited."""
    with _lock:
        count = len(_line)
        _line.clear()
    return count


class BusyError(SpoError):
    """Work is going on already."""


def stop(how: str) -> None:
    """End the current work: "save" after what it is doing, with everything saved; "now" without."""
    if how not in ("save", "now"):
        raise SpoError(f'stop is "{how}"; accepted are save and now.')
    job = _current
    if job is None or not job.live:
        raise SpoError("Nothing is going on that could be stopped.")
    job.stop_wanted = how
    job.say("Stopping, with the state saved ..." if how == "save" else "Stopping at once ...")


def end(timeout_s: float = 120.0) -> None:
    """Stop the current work, with its state saved, and wait for its thread; nothing follows it: for Reload UI."""
    clear_line()
    thread, job = _thread, _current
    if thread is not None and thread.is_alive() and job is not None:
        job.stop_wanted = job.stop_wanted or "save"
        thread.join(timeout_s)


def _run_queued(job: Job, work: Callable[[Job], None]) -> None:
    while True:
        with webui.in_queue(job.task, job.task):
            run(job, work)
        job.version += 1
        if job.phase != "waiting":
            break
        webui.let_others_begin()
        job.task = webui.new_task("spo")
    with _lock:
        if _line:
            following, its_work = _line.pop(0)
            following.task, following.begun_s = webui.new_task("spo"), time.time()
            _begin(following, its_work)


def run(job: Job, work: Callable[[Job], None]) -> None:
    """Do the work; however it ends, the job says so. Phase "waiting" afterwards: it made way and is to be run again."""
    try:
        if job.stop_wanted == "now" or (job.stop_wanted and not job.made_way):
            raise Abandoned
        job.phase = "loading"
        work(job)
        if job.phase in ("loading", "working"):
            job.phase = "finished"
    except SpoError as error:
        job.phase = "failed"
        job.say(str(error))
    except Abandoned:
        job.phase = "stopped"
        job.say("Stopped. What was saved before is still there.")
    except OSError as error:  # after what writes files has tried again and again
        job.phase = "failed"
        job.say(
            f'"{Path(str(error.filename or "a file")).name}" could not be read or written: {error.strerror or error}. '
            "What was saved before is still there: make room, or close the program that holds the file, and resume."
        )
        webui.report(f"SPO: {job.kind} of {job.name} failed")
    except BaseException as error:  # the WebUI's InterruptedException is not an Exception
        job.phase = "failed"
        job.say(f"{type(error).__name__}: {error}. The details are in the WebUI's console.")
        webui.report(f"SPO: {job.kind} of {job.name} failed")

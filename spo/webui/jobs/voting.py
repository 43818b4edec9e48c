"""Voting on the loaded checkpoint's own pictures: made ahead, votes on disk, the head fitted on the way.

A thread makes pictures while the user looks, a few at a time in the WebUI's queue, so that generation goes on in
between. They wait on disk: whoever made many ahead votes at the speed of the eye, today or tomorrow.

While a run trains on a head that is refitted to these votes (`live_votes`), it makes the pictures, by the policy as it
is, and fits the head; the voting only shows what the run lays out on disk.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from spo.config import Config, build_config
from spo.errors import SpoError
from spo.files import exists_already
from spo.preference.load import load
from spo.preference.taste.fit import (
    FitReport,
    FittedTaste,
    HeldOutAccuracy,
    VoteSet,
    accuracy_of,
    fit_taste,
    read_vote_set,
)
from spo.preference.taste.head import save_taste
from spo.preference.taste.votes import Vote, VoteFolder, VotePair, VotePool, comparisons
from spo.preference.taste.waiting import WaitingPools
from spo.progress import StopRequested
from spo.rng import permutation, stable_seed
from spo.training.live_taste import policy_name
from spo.training.memory import free_memory, is_out_of_memory
from spo.training.vote_pairs import make_pools
from spo.webui import folders
from spo.webui.host import borrowed
from spo.webui.jobs import job
from spo.webui.seam import webui

if TYPE_CHECKING:
    from PIL.Image import Image

READY = 6  # pairs or pools made ahead, at least
MOST_AHEAD = 1000
FIT_EVERY = 25
FIRST_FIT = 50
UNDO_DEPTH = 20  # pairs and pools that come back by undo; all votes stay on disk
_MAKING_FIRST = "Making the first pictures ..."
_LOOK_EVERY_S = 1.0  # for what a run has laid out


@dataclass(frozen=True)
class VotingRequest:
    """What to make. size: pictures at a time, 2 or more; from_step: first step whose noise differs; None: other seeds.

    ahead  how many are made ahead and wait on disk
    """

    folder: str
    prompts: Sequence[str]
    from_step: int | None = 4
    sampling_steps: int = 20
    guidance_scale: float = 5.0
    width: int = 0
    height: int = 0
    negative_prompt: str = ""
    size: int = 2
    ahead: int = READY


def votes_folder(name: str) -> Path:
    """models/SPO/votes/NAME. SpoError for a name that is none."""
    return folders.preference_folder() / "votes" / folders.plain_name(name, "the name of the votes")


@dataclass
class Session:
    """One user's voting. Methods are called by the page; `_work` by the thread.

    pool      to vote on, None while none is ready; ready: made ahead; past: the last ones, each with its votes' count
    run       the training run that makes the pictures and fits the head; None: this session does
    message   one sentence for the user; report: of the last fit; checkpoint: its name and hash
    """

    request: VotingRequest
    config: Config
    checkpoint: tuple[str, str] = ("", "")
    run: job.Job | None = None
    message: str = _MAKING_FIRST
    pool: VotePool | None = None
    ready: list[VotePool] = field(default_factory=list)
    past: list[tuple[VotePool, int]] = field(default_factory=list)
    report: FitReport | None = None
    fitting: bool = False
    ended: bool = False
    _made: int = 0
    _next_fit: int = FIRST_FIT
    _gives_up_fit: bool = False
    _wake: threading.Condition = field(default_factory=threading.Condition)

    def __post_init__(self) -> None:
        self.votes = VoteFolder(votes_folder(self.request.folder))
        self.waiting = WaitingPools(self.votes)
        self.seed = stable_seed("voting", self.request.folder, time.time_ns())

    # ---- the page's side

    def answer(self, answer: str) -> None:
        """Record the vote on the pair that is shown and show the next one. SpoError when none is shown.

        A pool of more is passed over by "skip", and takes no other answer.
        """
        with self._wake:
            pool = self._shown()
            if len(pool) > 2 and answer != "skip":
                raise SpoError("Name the best picture of the four, then the worst.")
            self._record(pool, {(0, 1): answer})
        self._fit_now_and_then()

    def choose(self, best: int, worst: int) -> None:
        """Record what the best and the worst of the pool that is shown say, and show the next one. SpoError."""
        with self._wake:
            pool = self._shown()
            self._record(pool, comparisons(len(pool), best, worst))
        self._fit_now_and_then()

    def undo(self) -> None:
        """Take back the last vote, of a pool all that it said, and show its pictures again."""
        with self._wake:
            pool, count = self.past.pop() if self.past else (None, 1)
            undone: Vote | None = None
            for _ in range(count):
                undone = self.votes.undo() or undone
            if undone is None:
                raise SpoError("There is no vote to take back.")
            self.message = f'Taken back: "{undone.prompt}".'
            if pool is not None:
                if self.pool is not None:
                    self.ready.insert(0, self.pool)
                self.pool = pool

    def end(self) -> None:
        with self._wake:
            self.ended = True
            self._wake.notify_all()

    def give_up_fit(self) -> None:
        """End the fit that goes on beside the voting, because a better one begins."""
        self._gives_up_fit = True

    def _shown(self) -> VotePool:
        if self.pool is None:
            raise SpoError("There is nothing to vote on yet; one moment.")
        return self.pool

    def _record(self, pool: VotePool, answers: Mapping[tuple[int, int], str]) -> None:
        count = len(self.votes.add_pool(pool, answers))
        self.past.append((pool, count))
        while len(self.past) > UNDO_DEPTH:
            self.waiting.remove(self.past.pop(0)[0])
        self.pool, self.message = None, ""
        self._show_next()
        self._wake.notify_all()

    def _fit_now_and_then(self) -> None:
        count = sum(1 for vote in self.votes.votes() if vote.answer != "skip")
        if count >= self._next_fit and not self.fitting and self.run is None:
            self._next_fit, self.fitting, self._gives_up_fit = count + FIT_EVERY, True, False
            threading.Thread(target=self._fit, name="spo fit", daemon=True).start()

    # ---- the threads' side

    def _show_next(self) -> None:
        if self.pool is None and self.ready:
            self.pool = self.ready.pop(0)

    def _work(self) -> None:
        try:
            if self.run is not None:
                return self._show_those_of(self.run)
            self._make_ready(self.waiting.all(self._fits))
            while self._has_to_make():
                self._make_ready([self.waiting.add(pool) for pool in self._make_pools(1 if self.pool is None else 2)])
        except Exception as error:  # the thread's edge: it reaches the user as the message
            self._report_failure(error)

    def _show_those_of(self, run: job.Job) -> None:
        """Take what the run lays out, until either ends."""
        policy = policy_name(self.checkpoint[0], run.name.rsplit("/", 1)[-1])
        known: set[str] = set()
        while run.live:
            new = [
                pool for pool in self.waiting.to_vote_on() if pool.checkpoint_name == policy and pool.id not in known
            ]
            known |= {pool.id for pool in new}
            self._make_ready(new)
            with self._wake:
                if self._wake.wait_for(lambda: self.ended, timeout=_LOOK_EVERY_S):
                    return
        self.message = f'"{run.name}" has ended, and with it the voting on its pictures; the votes are on disk.'
        self.ended = True

    def _has_to_make(self) -> bool:
        """Waits until something is lacking, or the voting has ended."""
        with self._wake:
            self._wake.wait_for(lambda: self.ended or len(self.ready) < max(READY, self.request.ahead))
            return not self.ended

    def _make_ready(self, pools: Sequence[VotePool]) -> None:
        with self._wake:
            self.ready += pools
            self._show_next()
            if self.pool is not None and self.message == _MAKING_FIRST:
                self.message = ""

    def _fits(self, pool: VotePool) -> bool:
        """Whether what waits is what would be made now."""
        step = -1 if self.request.from_step is None else self.request.from_step
        width, height = self.config.prompt.width // 8, self.config.prompt.height // 8
        return (
            (len(pool), pool.from_step) == (self.request.size, step)
            and (pool.checkpoint_name, pool.checkpoint_hash) == self.checkpoint
            and tuple(pool.latents.shape[2:]) == (height, width)
            and pool.prompt in self.request.prompts
        )

    def _report_failure(self, error: Exception) -> None:
        if not isinstance(error, SpoError):
            webui.report("SPO: making pictures to vote on failed")
        self.message = f"{error} Voting has ended; the votes are on disk."
        self.ended = True

    def _make_pools(self, count: int) -> list[VotePool]:
        with webui.in_queue("SPO voting"):
            if self.ended:
                return []
            with borrowed(self.config) as host:
                first = self._made
                self._made += count
                prompts, seeds = zip(*(self._position(first + n) for n in range(count)), strict=True)
                host.prepare(prompts)
                eta = self.config.rollout.eta
                pools = make_pools(host, prompts, seeds, self.request.size, self.request.from_step, eta)
        return [pool.shuffled(permutation(len(pool), self.seed, "sides", first + n)) for n, pool in enumerate(pools)]

    def _position(self, index: int) -> tuple[str, int]:
        """Prompt and seed of pool number `index`: all prompts in turn, in another order each time round."""
        prompts = self.request.prompts
        round_, within = divmod(index, len(prompts))
        order = permutation(len(prompts), self.seed, round_)
        return prompts[order[within]], stable_seed(self.seed, index) % 2**32

    def _fit(self) -> None:
        def progress(share: float) -> None:
            if self._gives_up_fit:
                raise StopRequested

        try:
            fitted = fitted_on_device(read_vote_set(self.votes), self.request.folder, progress=progress)
            self.report, self.message = fitted.report, ""
        except StopRequested:
            pass
        except SpoError as error:
            self.message = str(error)
        except Exception as error:  # the thread's edge: it reaches the user as the message, and voting goes on
            webui.report("SPO: fitting to the votes failed")
            self.message = (
                f"Fitting to your votes failed ({type(error).__name__}: {error}); the votes are on disk, voting goes "
                "on, and the details are in the WebUI's console."
            )
        finally:
            self.fitting = False


_session: Session | None = None
_threads: list[threading.Thread] = []


def current() -> Session | None:
    """The voting that goes on, or the last one."""
    return _session


def start(request: VotingRequest) -> Session:
    """Begin, at once: pictures are made as the queue allows. SpoError for what cannot work; an earlier session ends."""
    global _session
    votes_folder(request.folder)
    prompts = [text.strip() for text in request.prompts if text.strip()]
    if not prompts:
        raise SpoError("There are no prompts; write some, one a line, or take the bundled list.")
    for value, name, low, high in (
        (request.size, "Pictures at a time", 2, 8),
        (request.ahead, "How many are made ahead", 1, MOST_AHEAD),
    ):
        if not low <= value <= high:
            raise SpoError(f"{name}: {value}; accepted is {low} to {high}.")
    config = _config(
        request.folder,
        {
            "width": request.width,
            "height": request.height,
            "sampling_steps": request.sampling_steps,
            "guidance_scale": request.guidance_scale,
            "negative_prompt": request.negative_prompt,
        },
    )
    last = config.rollout.sampling_steps - 1
    if request.from_step is not None and not 0 <= request.from_step < last:
        raise SpoError(f"The step where pictures part ways is {request.from_step}; accepted is 0 to {last - 1}.")
    running = job.current()
    run = running if running is not None and running.live else None
    if run is not None and run.live_votes != str(votes_folder(request.folder)):
        raise SpoError(f'"{run.name}" is still going on; stop it or wait for its end.')
    if _session is not None:
        _session.end()
    checkpoint = webui.loaded_checkpoint()
    _session = Session(replace(request, prompts=prompts), config, (checkpoint.name, checkpoint.hash), run)
    thread = threading.Thread(target=_session._work, name="spo voting", daemon=True)
    _threads[:] = [one for one in _threads if one.is_alive()] + [thread]
    thread.start()
    return _session


def _config(name: str, values: dict[str, Any]) -> Config:
    """Sampling settings on the loaded checkpoint; nothing is trained, so the rest is for form's sake."""
    checkpoint = job.ready_checkpoint()
    unused = {"prompts": name, "output": f"{name}.safetensors", "preference": "none"}
    fixed = {"checkpoint": str(checkpoint.file), "clip_skip": webui.clip_skip()}
    usual_px = folders.usual_size_px(checkpoint.architecture, checkpoint.file.name)
    sides = {side: values[side] or usual_px for side in ("width", "height")}
    return build_config({**unused, **fixed, **values, **sides}, checkpoint.architecture)


def end(timeout_s: float = 120.0) -> None:
    """End the voting; votes are on disk already. Its thread finishes the pictures that it makes, waited for so long."""
    if _session is not None:
        _session.end()
    for thread in _threads:
        thread.join(timeout_s)


def add_pictures(folder: str, prompt: str, left: Image, right: Image, answer: str) -> str:
    """A vote on two pictures of the user's own, of one prompt and one size; a text about it. SpoError.

    left, right  pictures with sides that are multiples of 8 pixels, taken to latents by the loaded checkpoint's VAE
    """
    if left.size != right.size or any(side % 8 for side in left.size):
        raise SpoError(
            f"The pictures are {left.width} x {left.height} and {right.width} x {right.height} pixels; two of the same "
            "size, with sides that are multiples of 8, are needed."
        )
    for side, picture in (("left", left), ("right", right)):
        if not picture.convert("RGB").getbbox():
            raise SpoError(f"The {side} picture is all black, as a VAE that overflows makes them; take another one.")
    if not prompt.strip():
        raise SpoError("The pictures' prompt is missing; write it.")
    config = _config("own pictures", {"width": left.width, "height": left.height})
    pixels = torch.stack([_pixels(left), _pixels(right)])
    with webui.in_queue("SPO voting"), borrowed(config) as host:
        latents = host.encode(pixels.to(host.device)).float().cpu()
        host.prepare([prompt.strip()])
        pair = VotePair(
            prompt.strip(), latents, pixels, 0, 0, -1, host.architecture, host.checkpoint_name, host.checkpoint_hash,
            host.text_features([prompt.strip()])[0],
        )  # fmt: skip
    VoteFolder(votes_folder(folder)).add(pair, answer)
    return f'Your vote on "{prompt.strip()}" is kept: {answer}.'


def _pixels(picture: Image) -> Tensor:
    """[3, height, width] in [-1, 1]."""
    values = np.asarray(picture.convert("RGB"), dtype=np.float32)
    return torch.from_numpy(values).permute(2, 0, 1) / 127.5 - 1


def fit(folder: str, name: str, beside: Sequence[str] = ()) -> str:
    """Fit a taste head to the votes and save it in models/SPO as NAME.safetensors; a text about it. SpoError.

    beside  other preference models whose accuracy on the same votes is compared
    """
    name = folders.plain_name(name, "the name of the taste head")
    path = folders.preference_folder() / f"{name}.safetensors"
    if path.exists():
        raise exists_already(path)
    place = VoteFolder(votes_folder(folder))
    votes = read_vote_set(place)
    others = [load(folders.preference_path(one), architecture=votes.architecture) for one in beside]
    session = current()
    if session is not None and session.votes.path == place.path:
        session.give_up_fit()  # it knows no vote that this one does not, and would take half of the machine
    fitted = fitted_on_device(votes, name, [accuracy_of(one, place, votes) for one in others])
    path.parent.mkdir(parents=True, exist_ok=True)
    save_taste(fitted.head, path)
    return f"{fitted.report.text()}\n\nSaved as {path.name}: choose it as the preference model in the Train tab."


def fitted_on_device(
    votes: VoteSet,
    name: str = "taste",
    others: Sequence[HeldOutAccuracy] = (),
    progress: Callable[[float], None] | None = None,
) -> FittedTaste:
    """On the WebUI's device, beside whatever it does; on the CPU when the device has no room left for it."""
    try:
        return fit_taste(votes, name=name, others=others, progress=progress, device=webui.device())
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    free_memory()
    return fit_taste(votes, name=name, others=others, progress=progress)

"""Voting on pairs of the loaded checkpoint's own pictures: pairs made ahead, votes on disk, the head fitted on the way.

A thread makes pairs while the user looks, a few at a time in the WebUI's queue, so that generation goes on in between.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from spo.config import Config, build_config
from spo.errors import SpoError
from spo.files import exists_already
from spo.preference.load import load
from spo.preference.taste.fit import FitReport, accuracy_of, fit_taste, read_vote_set
from spo.preference.taste.head import TasteHead, choose_pair, save_taste
from spo.preference.taste.votes import Vote, VoteFolder, VotePair
from spo.rng import permutation, stable_seed
from spo.training.vote_pairs import make_pairs
from spo.webui import a1111, folders
from spo.webui.host import borrowed
from spo.webui.jobs import job

if TYPE_CHECKING:
    from PIL.Image import Image

READY = 6  # pairs made ahead, from which the one that teaches most is taken
FIT_EVERY = 25
FIRST_FIT = 50
UNDO_DEPTH = 20  # pairs that come back by undo; all votes stay on disk


@dataclass(frozen=True)
class VotingRequest:
    """What pairs to make. from_step: first step whose noise differs; None: two seeds."""

    folder: str
    prompts: Sequence[str]
    from_step: int | None = 4
    sampling_steps: int = 20
    guidance_scale: float = 5.0
    width: int = 0
    height: int = 0
    negative_prompt: str = ""


def votes_folder(name: str) -> Path:
    """models/SPO/votes/NAME. SpoError for a name that is none."""
    text = (name or "").strip()
    if not text or text.startswith(".") or not all(letter.isalnum() or letter in " _-." for letter in text):
        raise SpoError(f'the name of the votes is "{text[:80]}"; give letters, digits, spaces, - and _.')
    return folders.preference_folder() / "votes" / text


@dataclass
class Session:
    """One user's voting. Methods are called by the page; `_work` by the thread.

    pair      to vote on, None while none is ready; ready: made ahead; past: the last ones voted on
    message   one sentence for the user; report: of the last fit
    """

    request: VotingRequest
    config: Config
    message: str = "Making the first pair ..."
    pair: VotePair | None = None
    ready: list[VotePair] = field(default_factory=list)
    past: list[VotePair] = field(default_factory=list)
    head: TasteHead | None = None
    report: FitReport | None = None
    fitting: bool = False
    ended: bool = False
    _made: int = 0
    _wake: threading.Condition = field(default_factory=threading.Condition)

    def __post_init__(self) -> None:
        self.votes = VoteFolder(votes_folder(self.request.folder))
        self.seed = stable_seed("voting", self.request.folder, time.time_ns())

    # ---- the page's side

    def answer(self, answer: str) -> None:
        """Record the vote on the pair that is shown and show the next one. SpoError when none is shown."""
        with self._wake:
            if self.pair is None:
                raise SpoError("There is no pair to vote on yet; one moment.")
            self.votes.add(self.pair, answer)
            self.past = [*self.past[1 - UNDO_DEPTH :], self.pair]
            self.pair, self.message = None, ""
            self._show_next()
            self._wake.notify_all()
        count = sum(1 for vote in self.votes.votes() if vote.answer != "skip")
        if count >= FIRST_FIT and count % FIT_EVERY == 0 and not self.fitting:
            self.fitting = True
            threading.Thread(target=self._fit, name="spo fit", daemon=True).start()

    def undo(self) -> None:
        """Take back the last vote and show its pair again."""
        with self._wake:
            undone: Vote | None = self.votes.undo()
            if undone is None:
                raise SpoError("There is no vote to take back.")
            self.message = f'Taken back: "{undone.prompt}".'
            if self.past and self.past[-1].id == undone.id:
                if self.pair is not None:
                    self.ready.insert(0, self.pair)
                self.pair = self.past.pop()

    def end(self) -> None:
        with self._wake:
            self.ended = True
            self._wake.notify_all()

    # ---- the threads' side

    def _show_next(self) -> None:
        if self.pair is None and self.ready:
            at = choose_pair(self.head, [pair.latents for pair in self.ready], seed=self._made)
            self.pair = self.ready.pop(at)

    def _work(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self.ended or len(self.ready) < READY)
                if self.ended:
                    return
            try:
                made = self._make_pairs(1 if self.pair is None else 2)
            except Exception as error:  # the thread's edge: it reaches the user as the message
                self._report_failure(error)
                return
            with self._wake:
                self.ready += made
                self._show_next()
                if self.message.startswith("Making"):
                    self.message = ""

    def _report_failure(self, error: Exception) -> None:
        if not isinstance(error, SpoError):
            a1111.report("SPO: making pairs failed")
        self.message = f"{error} Voting has ended; the votes are on disk."
        self.ended = True

    def _make_pairs(self, count: int) -> list[VotePair]:
        with a1111.in_queue("SPO voting"):
            if self.ended:
                return []
            with borrowed(self.config) as host:
                host.prepare(list(self.request.prompts))
                chosen = [self._position(self._made + n) for n in range(count)]
                self._made += count
                return make_pairs(
                    host,
                    [prompt for prompt, _ in chosen],
                    [seed for _, seed in chosen],
                    self.request.from_step,
                    self.config.rollout.eta,
                )

    def _position(self, index: int) -> tuple[str, int]:
        """Prompt and seed of pair number `index`: all prompts in turn, in another order each time round."""
        prompts = self.request.prompts
        round_, within = divmod(index, len(prompts))
        order = permutation(len(prompts), self.seed, round_)
        return prompts[order[within]], stable_seed(self.seed, index) % 2**32

    def _fit(self) -> None:
        try:
            fitted = fit_taste(read_vote_set(self.votes), name=self.request.folder)
            self.head, self.report, self.message = fitted.head, fitted.report, ""
        except SpoError as error:
            self.message = str(error)
        except Exception as error:  # the thread's edge: it reaches the user as the message, and voting goes on
            a1111.report("SPO: fitting to the votes failed")
            self.message = (
                f"Fitting to your votes failed ({type(error).__name__}: {error}); the votes are on disk, voting goes "
                "on, and the details are in the WebUI's console."
            )
        finally:
            self.fitting = False


_session: Session | None = None
_thread: threading.Thread | None = None


def current() -> Session | None:
    """The voting that goes on, or the last one."""
    return _session


def start(request: VotingRequest) -> Session:
    """Begin to make pairs. SpoError for what cannot work; an earlier session ends."""
    global _session, _thread
    votes_folder(request.folder)
    prompts = [text.strip() for text in request.prompts if text.strip()]
    if not prompts:
        raise SpoError("There are no prompts; write some, one a line, or take the bundled list.")
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
    if running is not None and running.live:
        raise SpoError(f'"{running.name}" is still going on; stop it or wait for its end.')
    end()
    _session = Session(VotingRequest(**{**vars(request), "prompts": prompts}), config)
    _thread = threading.Thread(target=_session._work, name="spo voting", daemon=True)
    _thread.start()
    return _session


def _config(name: str, values: dict[str, Any]) -> Config:
    """Sampling settings on the loaded checkpoint; nothing is trained, so the rest is for form's sake."""
    checkpoint = job.ready_checkpoint()
    unused = {"prompts": name, "output": f"{name}.safetensors", "preference": "none"}
    fixed = {"checkpoint": str(checkpoint.file), "clip_skip": a1111.clip_skip()}
    return build_config({**unused, **fixed, **values}, checkpoint.architecture)


def end(timeout_s: float = 120.0) -> None:
    """End the voting and wait for its thread; votes are on disk already. For Reload UI, too."""
    if _session is not None:
        _session.end()
    if _thread is not None and _thread.is_alive():
        _thread.join(timeout_s)


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
    with a1111.in_queue("SPO voting"), borrowed(config) as host:
        latents = host.encode(pixels.to(host.device)).float().cpu()
        pair = VotePair(
            prompt.strip(), latents, pixels, 0, 0, -1, host.architecture, host.checkpoint_name, host.checkpoint_hash
        )
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
    votes_folder(name)  # the same rule for names
    path = folders.preference_folder() / f"{name.strip()}.safetensors"
    if path.exists():
        raise exists_already(path)
    place = VoteFolder(votes_folder(folder))
    votes = read_vote_set(place)
    others = [load(folders.preference_path(one), architecture=votes.architecture) for one in beside]
    fitted = fit_taste(votes, name=name.strip(), others=[accuracy_of(one, place, votes) for one in others])
    path.parent.mkdir(parents=True, exist_ok=True)
    save_taste(fitted.head, path)
    return f"{fitted.report.text()}\n\nSaved as {path.name}: choose it as the preference model in the Train tab."

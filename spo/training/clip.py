"""Train a step-aware CLIP on labelled pairs by the published recipe. Paper, section 3.1; read from top to bottom.

Both pictures of a pair are encoded, get the same noise at a timestep drawn uniformly, and are replaced by the guided
clean prediction of the diffusion model, decoded. The model judges those for that timestep.

Deliberate differences from the published code:
- the learning rate rises linearly over the warm-up (there logarithmically), then falls linearly to zero, as there;
- everything random is a function of (seed, update, pair), so a resumed run ends the same, bit for bit;
- accuracy is measured on prompts that training never sees, and on pairs that are no ties.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spo.algorithm.diffusion import training_sigmas
from spo.algorithm.preference import Candidates, PreferenceModel
from spo.checkpoint.tensor_file import TensorFile
from spo.config import OptimizerConfig
from spo.errors import SpoError
from spo.files import exists_already, write_patiently
from spo.preference.clip.loss import pair_label_loss
from spo.preference.clip.pair_data import PairSource, PicturePair, fitted, is_held_out, picture_tensor
from spo.preference.clip.scores import clip_tensors, is_plain_clip, weights_in
from spo.preference.clip.step_aware import StepAwareCLIP, is_step_aware_clip, read_step_aware_clip, save_step_aware_clip
from spo.preference.clip.towers import check_tensors, clip_shape, read_clip_config, token_ids
from spo.preference.pickles import open_model_file
from spo.progress import Progress, Watcher
from spo.rng import generator
from spo.runs.layout import RunFiles
from spo.runs.metrics import MetricsFile
from spo.runs.state import Stateful, load_state, save_state
from spo.training.host import Host
from spo.training.memory import halve_decode_batch, retry_with_less
from spo.training.optimizer import make_optimizer
from spo.training.processes import ALONE, Processes, any_of, share_of
from spo.training.schedule import Position, learning_rate, seconds_left

KIND = "step-aware CLIP"  # of run, in its state file
MEASURED_TIMESTEPS = (0, 251, 501, 701, 951)
# architecture -> what the paper used; the rest of the defaults is the same for both
PRESETS: dict[str, dict[str, Any]] = {
    "sd15": {"learning_rate": 3e-6, "steps": 8000},
    "sdxl": {"learning_rate": 1e-6, "steps": 7000},
}


@dataclass(frozen=True)
class ClipTraining:
    """The settings of a training run; the defaults are the paper's for SD1.5.

    output           the .safetensors file to write; state and metrics go to NAME.spo/ beside it
    width, height    in pixels, of the pictures that the diffusion model sees
    pairs_per_call   pairs in one pass; their weights (1 / pairs of the prompt) are normalized among them, as published
    accumulation     passes for one update, so an update has pairs_per_call * accumulation pairs
    held_out_one_in  one in so many prompts is kept to measure with; 0: none
    measured_pairs   how many of their pairs are measured
    measure_every    updates between measurements, besides one before and one at the end; 0: only those two
    label_gap        with a labelling model: a pair whose softmax probabilities differ by less is a tie
    train_text       whether the text tower learns, too, as published
    optimizer        "adamw", or "adamw8bit" (bitsandbytes), whose moments take a quarter
    """

    output: Path
    width: int = 512
    height: int = 512
    steps: int = 8000
    pairs_per_call: int = 4
    accumulation: int = 16
    learning_rate: float = 3e-6
    warmup_steps: int = 500
    weight_decay: float = 0.3
    clip_norm: float = 1.0
    seed: int = 0
    held_out_one_in: int = 50
    measured_pairs: int = 128
    measure_every: int = 1000
    save_every: int = 500
    label_gap: float = 0.1
    train_text: bool = True
    optimizer: str = "adamw"
    save_precision: str = "float32"
    replace: bool = False

    def __post_init__(self) -> None:
        lows = {"steps": 1, "pairs_per_call": 1, "accumulation": 1, "width": 64, "height": 64, "measured_pairs": 1}
        rest = ("learning_rate", "warmup_steps", "weight_decay", "clip_norm", "held_out_one_in", "measure_every")
        for name, low in {**lows, **dict.fromkeys((*rest, "save_every", "label_gap", "seed"), 0)}.items():
            value = getattr(self, name)
            if not low <= value < math.inf:
                raise SpoError(f"{name} is {value}; accepted are numbers from {low}.")
        for name in ("width", "height"):
            if getattr(self, name) % 8:
                raise SpoError(f"{name} is {getattr(self, name)} pixels; accepted are multiples of 8 from 64.")
        if self.save_precision not in ("float32", "float16", "bfloat16"):
            raise SpoError(f'save_precision is "{self.save_precision}"; accepted are float32, float16 and bfloat16.')
        if self.optimizer not in ("adamw", "adamw8bit"):
            raise SpoError(f'optimizer is "{self.optimizer}"; accepted are adamw and adamw8bit.')
        if self.output.suffix != ".safetensors":
            raise SpoError(f'output is "{self.output}"; accepted is a name that ends in .safetensors.')


@dataclass(frozen=True)
class Accuracy:
    """share: of `pairs` held-out pairs without ties, those whose winner has the higher score at this timestep."""

    timestep: int
    share: float
    pairs: int


@dataclass(frozen=True)
class ClipTrainingReport:
    """How a run ended. finished: all updates done; output: the file, None when stopped; skipped: unusable pairs."""

    finished: bool
    steps: int
    output: Path | None
    accuracy: tuple[Accuracy, ...]
    skipped: int
    files: RunFiles


def memory_bytes(model: StepAwareCLIP, settings: ClipTraining) -> int:
    """What training `model` takes, beside the activations of a pass and the diffusion model."""
    moment_bytes = 1 if settings.optimizer == "adamw8bit" else 4
    return model.training_bytes(train_text=settings.train_text, moment_bytes=moment_bytes)


# ---------------------------------------------------------------------------------------------- start


def starting_model(path: Path, seed: int = 0) -> StepAwareCLIP:
    """A step-aware CLIP to train, float32 on the CPU: from PickScore or another CLIP (fresh, neutral modulation), or
    from a step-aware one to go on with. Raises SpoError for anything else.
    """
    file = open_model_file(weights_in(path))
    if is_step_aware_clip(file):
        return read_step_aware_clip(file, path.stem)
    if not is_plain_clip(file):
        raise SpoError(f'"{path.name}" is neither a CLIP, as PickScore, nor a step-aware one to go on with.')
    return _with_time(file, path.stem, seed)


def _with_time(file: TensorFile, name: str, seed: int) -> StepAwareCLIP:
    tensors = clip_tensors(file)
    shapes = {ours: tuple(value.shape) for ours, value in tensors.items()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = StepAwareCLIP(clip_shape(shapes, read_clip_config(file), f'"{file.path.name}"'), name)
    fresh = {ours: v for ours, v in model.state_dict().items() if "adaLN_modulation" in ours or "t_embedder" in ours}
    own = {ours: tuple(value.shape) for ours, value in fresh.items()}
    check_tensors(model, {**own, **shapes}, f'"{file.path.name}"', "CLIP without time")
    model.load_state_dict({**fresh, **{ours: value.float() for ours, value in tensors.items()}})
    return model.eval().requires_grad_(False)


# ---------------------------------------------------------------------------------------------- predictions


@torch.no_grad()
def predicted_pictures(
    host: Host, pictures: Tensor, captions: Sequence[str], timesteps: Tensor, position: tuple[int | str, ...]
) -> Tensor:
    """What the diffusion model makes of noised pairs, decoded: [N, 2, 3, H, W] in [-1, 1], float32.

    pictures   [N, 2, 3, H, W] in [-1, 1]; captions: N; timesteps: [N] whole, 0 ... 999
    position   from which the noise follows: of pair n, one of the VAE for each picture, and one that both share
    """
    count, height, width = len(pictures), pictures.shape[-2] // 8, pictures.shape[-1] // 8
    shape = (4, height, width)
    vae_noise = torch.cat([torch.randn(2, *shape, generator=generator(*position, "vae", n)) for n in range(count)])
    noise = torch.stack([torch.randn(shape, generator=generator(*position, "noise", n)) for n in range(count)])
    host.prepare(list(captions))
    latents = host.encode(pictures.flatten(0, 1).to(host.device), vae_noise.to(host.device))
    sigma = training_sigmas(host.alphas_cumprod)[timesteps.to(host.alphas_cumprod.device)].float().to(host.device)
    sigma = sigma.repeat_interleave(2)
    x = latents.float() + sigma[:, None, None, None] * noise.to(host.device).repeat_interleave(2, 0)
    prompts = [caption for caption in captions for _ in range(2)]
    denoised = host.denoise(x, sigma, prompts, torch.zeros(2 * count, dtype=torch.long, device=host.device))
    return host.decode(denoised).float().unflatten(0, (count, 2))


def pair_scores(model: StepAwareCLIP, pictures: Tensor, captions: Sequence[str], timesteps: Tensor) -> Tensor:
    """[N, 2] float32 scores of [N, 2, 3, H, W] pictures for their timesteps [N] and captions, with gradient."""
    image = model.image_features(pictures.flatten(0, 1), timesteps.repeat_interleave(2)).unflatten(0, (-1, 2))
    text = model.text_features(token_ids(captions))
    return model.logit_scale.float().exp() * (image * text[:, None]).sum(-1)


@torch.no_grad()
def accuracy_by_timestep(
    model: StepAwareCLIP,
    host: Host,
    pairs: Sequence[PicturePair],
    settings: ClipTraining,
    timesteps: Sequence[int] = MEASURED_TIMESTEPS,
    processes: Processes = ALONE,
) -> tuple[Accuracy, ...]:
    """How often the model agrees with the labels, at each timestep; at 0 on the pictures as they are, as published.

    The noise is the same at every measurement. Ties do not count. processes: among which the pairs are dealt out
    """
    decided = [pair for pair in pairs if pair.label_0 != 0.5]

    def counted() -> dict[int, int]:
        """Timestep -> of this process's pairs, how many it is right about."""
        right = dict.fromkeys(timesteps, 0)
        for start in share_of(processes, range(0, len(decided), settings.pairs_per_call)):
            some = decided[start : start + settings.pairs_per_call]
            pictures, captions = _tensors(some, settings).to(host.device), [pair.caption for pair in some]
            wins = torch.tensor([pair.label_0 > 0.5 for pair in some])
            for timestep in timesteps:  # within a portion, whose captions are encoded once
                times = torch.full((len(some),), timestep)
                judged = pictures
                if timestep > 0:
                    position = (settings.seed, "measured", timestep, start)
                    judged = predicted_pictures(host, pictures, captions, times, position)
                scores = pair_scores(model, judged, captions, times).cpu()
                right[timestep] += int(((scores[:, 0] > scores[:, 1]) == wins).sum())
        return right

    counts = processes.gather(counted)
    shares = {timestep: sum(right[timestep] for right in counts) / max(1, len(decided)) for timestep in timesteps}
    return tuple(Accuracy(timestep, share, len(decided)) for timestep, share in shares.items() if decided)


@torch.no_grad()
def labels_by(model: PreferenceModel, pictures: Tensor, captions: Sequence[str], gap: float) -> Tensor:
    """[N] labels (1, 0, or 0.5 for a tie) by another model's scores of [N, 2, 3, H, W] pictures, as the paper for SDXL.

    gap  a pair is a tie when the softmax probabilities of its two scores differ by no more
    """
    pool = pictures.transpose(0, 1)
    nothing = pictures.new_zeros(2, len(pictures), 4, 1, 1)
    candidates = Candidates(nothing, 0.0, 0.0, nothing, lambda latents: pool.flatten(0, 1))
    p0, p1 = model.score(candidates, captions).softmax(0)
    return torch.where((p0 - p1).abs() > gap, (p0 > p1).float(), 0.5).cpu()


def rate_at(settings: ClipTraining, step: int) -> float:
    """The learning rate of update `step`, from 0: linear up over the warm-up, then linear down to zero at the end."""
    fraction = max(0, step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    return learning_rate(settings.learning_rate, "linear", settings.warmup_steps, step, min(1.0, fraction))


# ---------------------------------------------------------------------------------------------- pairs, one by one


class TrainingPairs:
    """Epoch after epoch of a source's pairs without those of held-out prompts. epoch, row: of the next pair."""

    def __init__(self, source: PairSource, settings: ClipTraining) -> None:
        self.source, self.settings = source, settings
        self.epoch, self.row = 0, 0
        self._endless = self._epochs()

    def take(self, count: int) -> list[PicturePair]:
        """The next `count`. Raises SpoError when a whole epoch has none that can be trained on."""
        return list(itertools.islice(self._endless, count))

    def _epochs(self) -> Iterator[PicturePair]:
        while True:
            from_start, usable = self.row == 0, False
            for pair in self.source.pairs(self.settings.seed, self.epoch, self.row):
                self.row = pair.row + 1
                if not is_held_out(pair.caption, self.settings.held_out_one_in):
                    usable = True
                    yield pair
            if from_start and not usable:
                raise SpoError(
                    f"None of the {len(self.source)} pairs can be trained on: {self.source.skipped} are broken, and "
                    f"the prompts of the rest are held out (held_out_one_in is {self.settings.held_out_one_in})."
                )
            self.epoch, self.row = self.epoch + 1, 0

    def held_out(self) -> list[PicturePair]:
        """The first measured_pairs pairs, as stored, of held-out prompts."""
        if not self.settings.held_out_one_in:
            return []
        skipped = self.source.skipped  # what is looked over here counts in its epoch
        pairs = self.source.pairs(self.settings.seed, -1)
        ours = (pair for pair in pairs if is_held_out(pair.caption, self.settings.held_out_one_in))
        smaller = [_smaller(pair, self.settings) for pair in itertools.islice(ours, self.settings.measured_pairs)]
        self.source.skipped = skipped
        return smaller

    def state_dict(self) -> dict[str, Any]:
        """See `runs.state.Stateful`."""
        return {"epoch": self.epoch, "row": self.row, "skipped": self.source.skipped}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `runs.state.Stateful`."""
        self.epoch, self.row, self.source.skipped = state["epoch"], state["row"], state["skipped"]


@dataclass
class LastMeasurement:
    """The newest accuracy, which a resumed run still has to write into its file."""

    accuracy: tuple[Accuracy, ...] = ()

    def state_dict(self) -> dict[str, Any]:
        """See `runs.state.Stateful`."""
        return {"accuracy": [asdict(entry) for entry in self.accuracy]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `runs.state.Stateful`."""
        self.accuracy = tuple(Accuracy(**entry) for entry in state["accuracy"])


# ---------------------------------------------------------------------------------------------- the loop


def check_output(settings: ClipTraining) -> None:
    """Raises SpoError when a file or a run of that name exists and may not be replaced; asked before all loading."""
    for path in (settings.output, RunFiles.of(settings.output).state):
        if path.exists() and not settings.replace:
            raise exists_already(path)


def train_clip(
    model: StepAwareCLIP,
    host: Host,
    source: PairSource,
    settings: ClipTraining,
    watcher: Watcher,
    *,
    labeller: PreferenceModel | None = None,
    resume: bool = False,
    processes: Processes = ALONE,
) -> ClipTrainingReport:
    """Train `model` (see `starting_model`) and write it in the published layout.

    labeller  gives the labels instead of the data, as PickScore did for SDXL
    resume    go on with the run of settings.output, whose settings must be the same
    processes  that train together, with a model and a host each: the passes of an update are dealt out (so more of them
              than `accumulation` have nothing to do), their gradients summed, and the main one writes

    Ends early, with its state saved, when the watcher says so. Raises SpoError for an output that exists, for data
    without a usable pair, and for a loss that is not finite.
    """
    # ---- May it begin, or go on? Nothing is touched before.
    files = RunFiles.of(settings.output)
    facts, is_main = _facts(settings, source, host), processes.index == 0
    saved = load_state(files.state, KIND) if resume else None
    if saved is None:
        processes.on_main(lambda: check_output(settings))
    else:
        for name, value in saved.facts.items():
            if facts.get(name) != value:
                raise SpoError(f"The run to resume has {name} {value}, not {facts.get(name)}; give the same settings.")

    # ---- Every object that must survive a stop stands in `survivors`.
    model = _unfreeze(model.to(host.device), settings)
    trained = [value for value in model.parameters() if value.requires_grad]
    optimizer = make_optimizer(
        trained, OptimizerConfig(optimizer=settings.optimizer, weight_decay=settings.weight_decay)
    )
    position, pairs, measurement = Position(), TrainingPairs(source, settings), LastMeasurement()
    survivors: dict[str, Stateful] = {
        "model": model,
        "optimizer": optimizer,
        "position": position,
        "pairs": pairs,
        "measurement": measurement,
    }
    held_out = pairs.held_out()
    if saved is not None:
        saved.restore(survivors)
    tables: list[MetricsFile] = []  # of the main process: updates, measurements

    def begin_folder() -> None:
        files.folder.mkdir(parents=True, exist_ok=True)
        for path, rows in ((files.metrics, position.step), (files.accuracy, position.step + 1)):
            tables.append(MetricsFile(path, watcher.log, keep_batches=rows if resume else None))

    processes.on_main(begin_folder)
    began = time.monotonic() - position.seconds

    def save() -> None:
        if is_main:
            write_patiently(lambda: save_state(files.state, KIND, facts, survivors), files.state, watcher.log)

    def measure() -> None:
        model.requires_grad_(False)
        measurement.accuracy = accuracy = accuracy_by_timestep(model, host, held_out, settings, processes=processes)
        _unfreeze(model, settings)
        if accuracy and is_main:
            shares = ", ".join(f"t {entry.timestep}: {entry.share:.1%}" for entry in accuracy)
            watcher.log(f"update {position.step}, accuracy on {accuracy[0].pairs} held-out pairs: {shares}")
            columns = {str(entry.timestep): entry.share for entry in accuracy}
            tables[1].add({"batch": position.step, "pairs": accuracy[0].pairs, **columns})

    if saved is None:
        measure()
    while position.step < settings.steps and not any_of(processes, watcher.should_stop()):
        # ---- The gradient, one pass after the other, each by one of the processes. The pairs go by in all of them.
        rate = rate_at(settings, position.step)
        for group in optimizer.param_groups:
            group["lr"] = rate

        def passes() -> list[float]:
            losses = []
            for call in range(settings.accumulation):
                some, place = pairs.take(settings.pairs_per_call), (settings.seed, "update", position.step, call)
                if call not in share_of(processes, range(settings.accumulation)):
                    continue
                captions, pictures = [pair.caption for pair in some], _tensors(some, settings).to(host.device)
                timesteps = torch.randint(1000, (len(some),), generator=generator(*place, "t"))
                labels = torch.tensor([pair.label_0 for pair in some])
                if labeller is not None:
                    labels = labels_by(labeller, pictures, captions, settings.label_gap)

                predicted = retry_with_less(
                    partial(predicted_pictures, host, pictures, captions, timesteps, place),
                    lambda: halve_decode_batch(host),
                    watcher.log,
                    "lower pairs_per_call in a new run, or close other programs",
                )
                scores = pair_scores(model, predicted, captions, timesteps)
                counts = torch.tensor([pair.pairs_of_prompt for pair in some])
                loss = pair_label_loss(scores[:, 0], scores[:, 1], labels.to(scores), counts.to(scores))
                (loss / settings.accumulation).backward()
                losses.append(float(loss.detach()))
            return losses

        losses = [loss for some in processes.gather(passes) for loss in some]

        # ---- The update.
        processes.sum_gradients(trained)
        norm = torch.nn.utils.clip_grad_norm_(trained, settings.clip_norm or math.inf)
        if not math.isfinite(sum(losses)) or not bool(torch.isfinite(norm)):
            raise SpoError(f"The loss of update {position.step + 1} is not finite; lower learning_rate ({rate:g}).")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        position.step += 1
        position.seconds = time.monotonic() - began
        mean = sum(losses) / len(losses)

        # ---- On the way: a measurement, a row of metrics, the state.
        last = position.step == settings.steps
        if last or (settings.measure_every and position.step % settings.measure_every == 0):
            measure()
        step = position.step
        row = {"batch": step - 1, "step": step, "loss": mean, "learning_rate": rate, "gradient_norm": float(norm)}
        if is_main:
            tables[0].add(row)
        fraction = step / settings.steps
        left_s = seconds_left(position.seconds, fraction)
        watcher.progress(Progress("training", pairs.epoch, step, fraction, left_s, {"loss": mean}))
        if last or (settings.save_every and step % settings.save_every == 0):
            save()

    # ---- The end, or a stop.
    finished = position.step == settings.steps
    if finished:
        dtype = getattr(torch, settings.save_precision)
        metadata = {"architecture": host.architecture, "trained_with": host.checkpoint_name}
        metadata |= {f"accuracy_{entry.timestep}": f"{entry.share:.4f}" for entry in measurement.accuracy}
        processes.on_main(lambda: save_step_aware_clip(model, settings.output, metadata, dtype=dtype))
    else:
        save()
    if source.skipped and is_main:
        watcher.log(f"{source.skipped} pairs were skipped, for a picture or label that is broken or missing.")
    output = settings.output if finished else None
    return ClipTrainingReport(finished, position.step, output, measurement.accuracy, source.skipped, files)


def _facts(settings: ClipTraining, source: PairSource, host: Host) -> dict[str, Any]:
    """What must be the same to resume."""
    free = ("output", "replace", "save_every", "save_precision")
    same = {name: value for name, value in asdict(settings).items() if name not in free}
    return {**same, "pairs": len(source), "checkpoint": host.checkpoint_name}


def _unfreeze(model: StepAwareCLIP, settings: ClipTraining) -> StepAwareCLIP:
    """What learns gets gradients: everything, or everything but the text tower."""
    model.requires_grad_(True)
    if not settings.train_text:
        model.text_model.requires_grad_(False)
        model.text_projection.requires_grad_(False)
    return model


def _tensors(pairs: Sequence[PicturePair], settings: ClipTraining) -> Tensor:
    """[N, 2, 3, height, width] in [-1, 1]."""
    size = (settings.width, settings.height)
    return torch.stack(
        [torch.stack([picture_tensor(side, *size) for side in (p.picture_0, p.picture_1)]) for p in pairs]
    )


def _smaller(pair: PicturePair, settings: ClipTraining) -> PicturePair:
    """Held-out pairs stay in memory all the time: at the size they are used in."""
    first, second = (fitted(side, settings.width, settings.height) for side in (pair.picture_0, pair.picture_1))
    return replace(pair, picture_0=first, picture_1=second)

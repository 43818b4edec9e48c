"""The training loop. Paper, algorithm 1; read from top to bottom.

Deliberate differences from the published code, results unchanged: one policy and one reference evaluation for a pair
whose win and lose side start from the same latent; the reference is the same network; conditioning is encoded once;
gradient clipping clips. And one addition: everything random is a function of the seed and of the position, so a run
that was stopped, or killed, ends in the same LoRA as one that was not.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from spo.algorithm.diffusion import checked_ladder, sigma_ladder
from spo.algorithm.objective import PairLoss, pair_loss, spo_loss
from spo.algorithm.pairs import Pairs
from spo.algorithm.preference import PreferenceModel
from spo.algorithm.rollout import PoolScores, PoolVerdict, Rollout, RolloutSettings
from spo.config import Config
from spo.errors import SpoError
from spo.files import write_text
from spo.images import to_picture
from spo.lora.adapter import Adapter, modules_of_kinds
from spo.lora.layer import LoraLayer, with_one_alpha
from spo.lora.metadata import LoraFacts, lora_metadata
from spo.lora.module_names import file_name
from spo.lora.read import check_matches, read_lora
from spo.lora.write import write_lora
from spo.progress import Progress, StopRequested, Watcher
from spo.report.grids import grid
from spo.rng import permutation, stable_seed
from spo.runs.layout import RunFiles
from spo.runs.metrics import MetricsFile
from spo.runs.state import RunState, flatten, keep_newest, load_state, restore, save_state
from spo.training.host import Host
from spo.training.memory import Portions, retry_with_less

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class TrainingReport:
    """How a run ended.

    finished  all steps done; False: stopped, to be resumed
    output    the LoRA file, or the last stage of a run that was stopped; None when no pair was kept
    """

    finished: bool
    steps: int
    output: Path | None
    files: RunFiles
    seconds: float


@dataclass
class Position:
    """Where a run stands: `batch` rollouts are done with, `step` optimizer updates made; `update` within the batch."""

    batch: int = 0
    step: int = 0
    update: int = 0
    images: int = 0
    pairs: int = 0
    seconds: float = 0.0


@dataclass
class BatchStatistics:
    """Sums over one rollout and the training on it; JSON-able, so that a stop in the middle keeps them."""

    rollout: dict[str, float] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    ratio_win: list[float] = field(default_factory=list)
    ratio_lose: list[float] = field(default_factory=list)
    clamped: list[float] = field(default_factory=list)
    gradient_norms: list[float] = field(default_factory=list)
    train_seconds: float = 0.0
    rollout_seconds: float = 0.0
    pairs: int = 0
    images: int = 0


def batches_per_epoch(prompts: int, config: Config) -> int:
    """How many rollouts go once over the prompts; the last may be smaller."""
    return math.ceil(prompts / config.optimizer.prompts_per_batch)


def batch_of(index: int, prompts: Sequence[str], config: Config) -> tuple[list[str], list[int]]:
    """(prompts, seeds) of rollout number `index`: each epoch goes over all prompts in an order of its own."""
    seed, size = config.run.seed, config.optimizer.prompts_per_batch
    epoch, within = divmod(index, batches_per_epoch(len(prompts), config))
    order = permutation(len(prompts), seed, "epoch", epoch)
    chosen = order[within * size : (within + 1) * size]
    return [prompts[i] for i in chosen], [stable_seed(seed, "image", epoch, i) for i in chosen]


def learning_rate(config: Config, step: int, fraction: float) -> float:
    """Of update number `step` (0-based), with `fraction` 0 ... 1 of the run done."""
    settings = config.optimizer
    warm = min(1.0, (step + 1) / settings.warmup_steps) if settings.warmup_steps else 1.0
    shape = {"constant": 1.0, "linear": 1 - fraction, "cosine": 0.5 * (1 + math.cos(math.pi * fraction))}
    return settings.learning_rate * warm * shape[settings.schedule]


def rollout_settings(config: Config) -> RolloutSettings:
    """The part of the configuration that `sample_spo` needs."""
    names = [item.name for item in dataclasses.fields(RolloutSettings)]
    return RolloutSettings(**{name: getattr(config.rollout, name) for name in names})


def ladder_of(config: Config, alphas_cumprod: Tensor) -> Tensor:
    """[steps + 1] the noise levels that `sigmas` and `sampling_steps` name. SpoError when they make no ladder."""
    text = config.rollout.sigmas
    if not any(character.isdigit() for character in text):
        return sigma_ladder(text, config.rollout.sampling_steps, alphas_cumprod)
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        raise SpoError(f'sigmas is "{text}"; give a name or falling numbers with commas between them.') from None
    return checked_ladder(numbers)


def loss_of_pairs(host: Host, adapter: Adapter, pairs: Pairs, prompts: Sequence[str], config: Config) -> PairLoss:
    """`pair_loss` of P pairs as configured. prompts: of the rollout's images; pairs.image points into them."""

    def policy(x: Tensor, sigma: Tensor, image: Tensor, step: Tensor) -> Tensor:
        return host.denoise(x, sigma, [prompts[i] for i in image.tolist()], step)

    def reference(x: Tensor, sigma: Tensor, image: Tensor, step: Tensor) -> Tensor:
        with adapter.reference():
            return policy(x, sigma, image, step)

    loss = partial(spo_loss, beta=config.loss.beta, ratio_clamp=config.loss.ratio_clamp)
    return pair_loss(policy, reference, pairs, loss, config.rollout.eta)


def train(
    host: Host,
    config: Config,
    prompts: Sequence[str],
    preference: PreferenceModel,
    watcher: Watcher | None = None,
    *,
    resume: bool = False,
) -> TrainingReport:
    """Train a LoRA for the host's checkpoint and write it to `config.run.output`. The network is left as found.

    resume  go on from the state in the output's run folder; the same configuration but for `steps` and `epochs`

    Raises SpoError for what the user can put right: before anything is written, or with the last good state saved.
    """
    run = _Run(host, config, prompts, preference, watcher or Watcher(), resume)
    try:
        return run.train()
    finally:
        run.adapter.remove()


def starting_lora(config: Config, host: Host) -> dict[str, LoraLayer]:
    """The layers of `start_from` by the host's module names; empty without one. SpoError when they do not fit."""
    if not config.lora.start_from:
        return {}
    return check_matches(read_lora(config.lora.start_from), host.network, host.naming, host.architecture)


class _Run:
    """The objects of one run. `train` is the loop; the rest opens, saves and reports."""

    def __init__(
        self,
        host: Host,
        config: Config,
        prompts: Sequence[str],
        preference: PreferenceModel,
        watcher: Watcher,
        resume: bool,
    ) -> None:
        self.host, self.config, self.prompts = host, config, list(prompts)
        self.preference, self.watcher = preference, watcher
        self.output = Path(config.run.output)
        self.files = RunFiles.of(self.output, config.run.run_folder)
        self.folder = self.files.folder
        self.position, self.statistics = Position(), BatchStatistics()
        self.pending: Pairs | None = None
        self.metrics_row: dict[str, float] = {}
        self.run_id, self.started_at = uuid.uuid4().hex, time.time()
        settings = config.optimizer
        self.portions = Portions(
            config.rollout.candidates_per_call or config.rollout.candidates,
            config.rollout.decode_batch,
            min(settings.pairs_per_call or settings.pairs_per_update, settings.pairs_per_update),
        )
        self.checkpointing = config.model.gradient_checkpointing
        self.stepping = False
        saved = load_state(self.files.state) if resume else None
        if saved is not None:
            _check_same_run(saved.facts["config"], config)
            _check_same_checkpoint(saved.facts, host)
        else:
            check_output(config)
        start = starting_lora(config, host)
        modules = modules_of_kinds(host.network, config.lora.modules)
        lora = config.lora
        self.adapter = Adapter(
            host.network, modules, rank=lora.rank, alpha=lora.alpha, seed=config.run.seed, start=start
        )
        try:
            if lora.reference == "base":
                self.adapter.use_base_as_reference()
            self.optimizer = _optimizer(self.adapter, config)
            self.scaler = _scaler(host)
            if saved is not None:
                self._restore(saved)
            host.prepare([*dict.fromkeys([*self.prompts, *self.sample_prompts])])
            self._open_folder(resume)
        except BaseException:
            self.adapter.remove()
            raise

    @property
    def sample_prompts(self) -> list[str]:
        return list(self.config.run.sample_prompts) or self.prompts[:4]

    # ---- the loop

    def train(self) -> TrainingReport:
        """Rollout, shuffle, update; save on the way; write the LoRA at the end, or what there is of it at a stop."""
        self.began = time.monotonic() - self.position.seconds
        if self.position.step == 0 and self.config.run.sample_every and not self._done():
            self._sample()
        try:
            while not self._done() and not self.watcher.should_stop():
                if self.pending is None:
                    self._roll_out()
                self._train_on_pending()
                if self.pending is None:
                    self._end_of_batch()
        except StopRequested:
            pass  # in the middle of a rollout, which is done again on resume
        except Exception:
            if not self.stepping and self._weights_are_finite():
                self._save_state()
            raise
        finally:
            if self.board is not None:
                self.board.close()
        finished = self._done()
        if finished and self.pending is not None:
            self._write_row()
        self.position.seconds = time.monotonic() - self.began
        self._save_state()
        output = None
        if self.position.step:
            output = self._write_lora(self.output) if finished else self._save_stage()
        return TrainingReport(finished, self.position.step, output, self.files, self.position.seconds)

    def _roll_out(self) -> None:
        """Phase 1: sample one batch of pictures and shuffle their pairs over prompts and steps."""
        began = time.monotonic()
        batch_prompts, seeds = batch_of(self.position.batch, self.prompts, self.config)

        def watch(verdict: PoolVerdict) -> None:
            self.watcher.verdict(verdict)
            if self.watcher.should_stop():
                raise StopRequested

        def roll_out() -> Rollout:
            self.host.decode_batch = self.portions.decodes
            settings = dataclasses.replace(rollout_settings(self.config), candidates_per_call=self.portions.candidates)
            return self.host.rollout(batch_prompts, seeds, settings, self.preference, watch)

        rolled = retry_with_less(
            roll_out, self.portions.halve_rollout, self.watcher.log, "lower prompts_per_batch, width or height"
        )
        self.statistics = BatchStatistics(rollout=_pool_statistics(rolled.pools), images=len(batch_prompts))
        if rolled.pairs is not None:
            order = permutation(len(rolled.pairs), self.config.run.seed, "pairs", self.position.batch)
            self.pending = rolled.pairs.rows(order)
        self.statistics.rollout_seconds = time.monotonic() - began
        self.position.images += len(batch_prompts)
        self._report("rollout")

    def _train_on_pending(self) -> None:
        """Phase 2: update on the batch's pairs, each used once. Leaves `pending` set when stopped in between."""
        settings = self.config.optimizer
        size = settings.pairs_per_update * settings.accumulation
        batch_prompts, _ = batch_of(self.position.batch, self.prompts, self.config)
        while self.pending is not None:
            start = self.position.update * size
            if start >= len(self.pending):
                self.pending = None
                return
            if self._done() or (self.position.update and self.watcher.should_stop()):
                return
            rows = torch.arange(start, min(start + size, len(self.pending)), device=self.pending.sigma.device)
            tick = time.monotonic()
            self._update(self.pending.rows(rows), batch_prompts)
            self.statistics.train_seconds += time.monotonic() - tick
            self.position.update += 1
            self.position.step += 1
            self.position.pairs += len(rows)
            self.position.seconds = time.monotonic() - self.began
            self._report("training")
            self._save_on_the_way()

    def _update(self, pairs: Pairs, batch_prompts: Sequence[str]) -> None:
        """One optimizer update on these pairs, evaluated `pairs_per_call` at a time."""
        settings, statistics = self.config.optimizer, self.statistics
        rate = learning_rate(self.config, self.position.step, self._fraction())
        for parameter_group in self.optimizer.param_groups:
            parameter_group["lr"] = rate
        results = retry_with_less(
            lambda: self._gradient(pairs, batch_prompts),
            self._lessen_training,
            self.watcher.log,
            "lower width, height or rank, or close other programs",
        )
        for result in results:
            statistics.losses += result.loss.detach().tolist()
            statistics.ratio_win += result.ratio_win.tolist()
            statistics.ratio_lose += result.ratio_lose.tolist()
            statistics.clamped += result.clamped.float().tolist()
        if not all(math.isfinite(loss) for loss in statistics.losses):
            raise self._not_finite("loss")
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.adapter.parameters(), settings.clip_norm or math.inf)
        statistics.gradient_norms.append(float(norm))
        if not math.isfinite(float(norm)) and not self.scaler.is_enabled():
            raise self._not_finite("gradient")
        self.stepping = True
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.stepping = False
        statistics.pairs += len(pairs)

    def _gradient(self, pairs: Pairs, batch_prompts: Sequence[str]) -> list[PairLoss]:
        """The gradient of one update's pairs in the LoRA weights, from scratch; the loss of each call."""
        size, results = self.config.optimizer.pairs_per_update, []
        self.optimizer.zero_grad(set_to_none=True)
        groups = math.ceil(len(pairs) / size)
        for begin in range(0, len(pairs), size):
            end = min(begin + size, len(pairs))
            for first in range(begin, end, self.portions.pairs):
                rows = torch.arange(first, min(first + self.portions.pairs, end), device=pairs.sigma.device)
                result = loss_of_pairs(self.host, self.adapter, pairs.rows(rows), batch_prompts, self.config)
                self.scaler.scale(result.loss.sum() / ((end - begin) * groups)).backward()
                results.append(result)
        return results

    def _lessen_training(self) -> str | None:
        told = self.portions.halve_training()
        if told is None and not self.checkpointing:
            self.checkpointing = True
            self.host.set_gradient_checkpointing(True)
            return "gradient_checkpointing on"
        return told

    def _end_of_batch(self) -> None:
        self._write_row()
        self.position.batch += 1
        self.position.update = 0
        self.statistics = BatchStatistics()

    def _write_row(self) -> None:
        row = self._row()
        self.metrics.add(row)
        self.metrics_row = {name: value for name, value in row.items() if isinstance(value, int | float)}
        if self.board is not None:
            for name, value in self.metrics_row.items():
                self.board.add_scalar(f"spo/{name}", value, self.position.step)

    def _not_finite(self, what: str) -> SpoError:
        return SpoError(
            f"The {what} is not finite at update {self.position.step}; the last good state is saved in {self.folder}. "
            "Lower learning_rate, or use precision bfloat16 or float32."
        )

    def _weights_are_finite(self) -> bool:
        tensors = self.adapter.tensors().values()
        return all(value.device.type != "meta" and bool(torch.isfinite(value).all()) for value in tensors)

    # ---- how far

    def _done(self) -> bool:
        if self.config.optimizer.steps:
            return self.position.step >= self.config.optimizer.steps
        return self.position.batch >= self.config.optimizer.epochs * batches_per_epoch(len(self.prompts), self.config)

    def _fraction(self) -> float:
        if self.config.optimizer.steps:
            return min(1.0, self.position.step / self.config.optimizer.steps)
        total = self.config.optimizer.epochs * batches_per_epoch(len(self.prompts), self.config)
        size = self.config.optimizer.pairs_per_update * self.config.optimizer.accumulation
        inside = 0.0
        if self.pending is not None:
            inside = min(1.0, self.position.update * size / len(self.pending))
        return min(1.0, (self.position.batch + inside) / total)

    # ---- files

    def _open_folder(self, resume: bool) -> None:
        if not resume and self.config.run.replace:
            self.files.delete()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.metrics = MetricsFile(self.files.metrics, self.position.batch if resume else None)
        write_text(self.files.config, json.dumps(self.config.flat(), indent=2) + "\n")
        write_text(self.files.prompts, json.dumps(self.prompts, indent=1, ensure_ascii=False) + "\n")
        self.board: Any = None
        with suppress(ImportError):
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(self.files.tensorboard), purge_step=self.position.step)
        if not resume:
            self._save_state()

    def _save_on_the_way(self) -> None:
        run = self.config.run
        if run.save_every and self.position.step % run.save_every == 0 and not self._done():
            self._save_state()
            self._save_stage()
        if (run.sample_every and self.position.step % run.sample_every == 0) or self.watcher.sample_now():
            self._sample()

    def _save_state(self) -> None:
        tensors = {f"lora/{name}": value for name, value in self.adapter.tensors().items()}
        optimizer = flatten(self.optimizer.state_dict(), "optimizer", tensors)
        if self.pending is not None:
            tensors |= {f"pending/{name}": value for name, value in self.pending.tensors().items()}
        facts = {
            "position": dataclasses.asdict(self.position),
            "statistics": dataclasses.asdict(self.statistics),
            "optimizer": optimizer,
            "scaler": self.scaler.state_dict(),
            "config": self.config.flat(),
            "checkpoint_name": self.host.checkpoint_name,
            "checkpoint_hash": self.host.checkpoint_hash,
            "run_id": self.run_id,
            "started_at": self.started_at,
            "prompts_seed": stable_seed(*self.prompts),
        }
        save_state(self.files.state, RunState(tensors, facts))

    def _restore(self, saved: RunState) -> None:
        if saved.facts["prompts_seed"] != stable_seed(*self.prompts):
            raise SpoError("The prompts are not those that the run began with; resume with the same file.")
        parts: dict[str, dict[str, Tensor]] = {"lora": {}, "pending": {}}
        for name, value in saved.tensors.items():
            part, _, rest = name.partition("/")
            parts.setdefault(part, {})[rest] = value
        self.adapter.load_tensors(parts["lora"])
        self.optimizer.load_state_dict(restore(saved.facts["optimizer"], saved.tensors))
        if parts["pending"]:
            self.pending = Pairs(**parts["pending"]).to(self.host.device)
        if saved.facts["scaler"]:
            self.scaler.load_state_dict(saved.facts["scaler"])
        self.position = Position(**saved.facts["position"])
        self.statistics = BatchStatistics(**saved.facts["statistics"])
        self.run_id, self.started_at = saved.facts["run_id"], saved.facts["started_at"]

    def _save_stage(self) -> Path:
        """The LoRA as it is, NAME-step000100.safetensors beside the output; only the newest stages stay."""
        path = self._write_lora(self.files.stage(self.position.step))
        keep_newest(self.files.stages(), self.config.run.keep_last)
        return path

    def _write_lora(self, path: Path) -> Path:
        network = [name for name, _ in self.host.network.named_modules()]
        named = {
            file_name(name, self.host.naming, self.host.architecture, network): layer
            for name, layer in self.adapter.weights().items()
        }
        layers = with_one_alpha(named)  # some loaders apply one alpha to all layers
        config = self.config
        facts = LoraFacts(
            architecture=self.host.architecture,
            prediction_type=self.host.prediction_type,
            rank=config.lora.rank,
            alpha=config.lora.alpha,
            checkpoint_name=self.host.checkpoint_name,
            checkpoint_hash=self.host.checkpoint_hash,
            started_at=self.started_at,
            learning_rate=config.optimizer.learning_rate,
            steps=self.position.step,
            epochs=config.optimizer.epochs,
            seed=config.run.seed,
            batch_size=config.optimizer.prompts_per_batch,
            precision=_precision_of(self.host.network),
            width_px=config.prompt.width,
            height_px=config.prompt.height,
            run_id=self.run_id,
            spo_config=config.flat(),
        )
        dtype = getattr(torch, config.run.save_precision)
        ours = path.exists() and _run_id_of(path) == self.run_id
        write_lora(path, layers, lora_metadata(path.stem, facts), dtype=dtype, replace=ours or config.run.replace)
        if path == self.output:
            write_text(self.files.settings, json.dumps(config.flat(), indent=2) + "\n")
        self.watcher.saved(path)
        return path

    def _sample(self) -> None:
        """One row of pictures at fixed seeds, samples/step000100.png."""
        prompts = self.sample_prompts
        plain = RolloutSettings(candidates=1, eta=self.config.rollout.eta)
        seeds = [self.config.run.sample_seed + i for i in range(len(prompts))]
        latents = self.host.rollout(prompts, seeds, plain, None, None).x
        pictures = [to_picture(pixels) for pixels in self.host.decode(latents)]
        self.files.samples.mkdir(exist_ok=True)
        grid([pictures], [f"step {self.position.step}"], prompts).save(self.files.sample(self.position.step))

    # ---- reports

    def _report(self, phase: str) -> None:
        fraction = self._fraction()
        eta = self.position.seconds * (1 / fraction - 1) if fraction > 0 and self.position.seconds else None
        self.watcher.progress(Progress(phase, self.position.step, self.position.batch, fraction, eta, self.metrics_row))

    def _row(self) -> dict[str, float | int | None]:
        s = self.statistics
        seconds = s.rollout_seconds + s.train_seconds
        return {
            "batch": self.position.batch,
            "step": self.position.step,
            "epoch": self.position.batch // batches_per_epoch(len(self.prompts), self.config),
            "images": self.position.images,
            "preference_mean": s.rollout.get("mean"),
            "kept_share": s.rollout.get("kept"),
            "pairs": s.pairs,
            "loss": _mean(s.losses),
            "ratio_win": _mean(s.ratio_win),
            "ratio_lose": _mean(s.ratio_lose),
            "ratio_clamped_share": _mean(s.clamped),
            "gradient_norm": _mean(s.gradient_norms),
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "images_per_s": s.images / seconds if seconds else None,
            "pairs_per_s": s.pairs / s.train_seconds if s.train_seconds else None,
            "seconds": self.position.seconds,
            **{name: value for name, value in s.rollout.items() if name.startswith("preference_t")},
        }


def check_output(config: Config) -> None:
    """SpoError when the output's name, folder or an existing file forbids a new run; writes nothing."""
    import os

    output = Path(config.run.output)
    if not config.run.output or output.suffix != ".safetensors":
        raise SpoError(f'output is "{config.run.output}"; it must be the name of a .safetensors file.')
    if not config.run.replace:
        for path in (output, RunFiles.of(output, config.run.run_folder).state):
            if path.exists():
                raise SpoError(
                    f'"{path}" exists already; resume that run, choose another name, or allow to replace it.'
                )
    existing = next((parent for parent in output.absolute().parents if parent.exists()), None)
    if existing is None or not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise SpoError(f'the output folder "{output.parent}" cannot be written; choose another one.')


def _check_same_run(saved: dict[str, Any], config: Config) -> None:
    """Resuming changes nothing but how long to go on, how often to save, and what of the machine to use."""
    free = {"steps", "epochs", "save_every", "keep_last", "sample_every", "sample_prompts", "sample_seed", "replace",
            "device", "pairs_per_call", "candidates_per_call", "decode_batch", "checkpoint", "prompts", "output",
            "run_folder", "gradient_checkpointing", "vae", "preference", "start_from",
            "precision", "learning_rate", "clip_norm"}  # fmt: skip
    now = config.flat()
    for name, value in saved.items():
        if name not in free and now.get(name) != value:
            raise SpoError(
                f"The run was begun with {name} = {value}, not {now.get(name)}; resume with the same settings."
            )


def _check_same_checkpoint(facts: Mapping[str, Any], host: Host) -> None:
    """A LoRA belongs to its checkpoint: by the hash when both are known, else by the name."""
    for key in ("checkpoint_hash", "checkpoint_name"):
        begun, now = facts.get(key), getattr(host, key)
        if begun and now:
            if begun != now:
                raise SpoError(
                    f"The run was begun on {facts.get('checkpoint_name')}, not on {host.checkpoint_name}; "
                    "load that checkpoint to go on."
                )
            return


def _run_id_of(path: Path) -> str:
    with suppress(SpoError):
        return read_lora(path).metadata.get("spo_run_id", "")
    return ""


def _optimizer(adapter: Adapter, config: Config) -> torch.optim.Optimizer:
    settings = config.optimizer
    arguments: dict[str, Any] = {
        "lr": settings.learning_rate,
        "betas": (settings.beta1, settings.beta2),
        "eps": settings.epsilon,
        "weight_decay": settings.weight_decay,
    }
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(adapter.parameters(), **arguments)
    try:
        import bitsandbytes
    except ImportError:
        raise SpoError("optimizer adamw8bit needs bitsandbytes: pip install bitsandbytes, or use adamw.") from None
    return bitsandbytes.optim.AdamW8bit(adapter.parameters(), **arguments)


def _scaler(host: Host) -> Any:
    """Loss scaling for a float16 network; does nothing for the others."""
    fp16 = next(host.network.parameters()).dtype == torch.float16
    if hasattr(torch.amp, "GradScaler"):
        return torch.amp.GradScaler(host.device.type, enabled=fp16)
    return torch.cuda.amp.GradScaler(enabled=fp16 and host.device.type == "cuda")  # torch before 2.3: on CUDA only


def _precision_of(network: nn.Module) -> str:
    """The network's, for the file's metadata; weights stored in float8 are computed with in float16."""
    name = str(next(network.parameters()).dtype).removeprefix("torch.")
    return "float16" if name.startswith("float8") else name


def _pool_statistics(pools: Sequence[PoolScores]) -> dict[str, float]:
    if not pools:
        return {}
    by_timestep = {f"preference_t{round(pool.timestep)}": float(pool.scores.mean()) for pool in pools}
    kept = torch.cat([pool.kept.float() for pool in pools])
    mean = torch.cat([pool.scores.flatten() for pool in pools]).mean()
    return {"mean": float(mean), "kept": float(kept.mean()), **by_timestep}


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None

"""The training loop. Paper, algorithm 1; `train` reads from top to bottom.

Deliberate differences from the published code, results unchanged: one policy and one reference evaluation for a pair
whose win and lose side start from the same latent; the reference is the same network; conditioning is encoded once.
And one addition: everything random is a function of the seed and of the position, so a run that was stopped, or killed,
ends in the same LoRA as one that was not.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
import uuid
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spo.algorithm.objective import PairLoss, RatioLoss
from spo.algorithm.pairs import Pairs
from spo.algorithm.preference import PreferenceModel
from spo.algorithm.rollout import PoolScores, PoolVerdict, Rollout, RolloutSettings, join_rollouts
from spo.config import Config
from spo.errors import SpoError
from spo.files import write_patiently, write_text
from spo.images import to_picture
from spo.lora.adapter import Adapter, configured_adapter
from spo.lora.read import check_matches, read_lora
from spo.preference.load import fingerprint
from spo.progress import Progress, StopRequested, Watcher
from spo.report.grids import grid
from spo.rng import permutation, stable_seed
from spo.runs.layout import RunFiles
from spo.runs.metrics import MetricsFile, write_rows
from spo.runs.state import Stateful, load_state, save_state
from spo.training.average import AverageWeights
from spo.training.finished_pairs import finished_pairs, noised, prompts_of_pairs
from spo.training.gradient import accumulate_gradient, configured_loss, taste_to_learn
from spo.training.host import Host, rollout_settings
from spo.training.live_taste import LiveTaste
from spo.training.memory import (
    Portion,
    Portions,
    ScoredInPortions,
    free_memory,
    halve_decode_batch,
    in_portions,
    once_more,
    retry_with_less,
)
from spo.training.optimizer import compiled, fast_cuda_math, make_optimizer, make_scaler, repeatable_first_step
from spo.training.pending import PendingPairs
from spo.training.processes import ALONE, Processes, any_of, share_of
from spo.training.resume import check_same_run, run_facts
from spo.training.schedule import (
    FRUITLESS_ROLLOUTS,
    Position,
    batch_of,
    batches_per_epoch,
    fraction_done,
    is_done,
    learning_rate,
    rows_of_batch,
    seconds_left,
)
from spo.training.stages import Stages
from spo.training.statistics import BatchStatistics, pool_statistics
from spo.training.teaching_window import TeachingWindow
from spo.training.validation import Judges, measure, prompts_of_checks
from spo.training.write_stage import stages_of_spo, write_stage

KIND = "LoRA"  # of run, in its state file
SKIPPED_UPDATES = 20  # overflows in a row after which a run ends; the scale has fallen a million times by then
_LESS_MEMORY = "choose precision float16 or rest_on_cpu, resume with it, or close other programs"


@dataclass(frozen=True)
class TrainingReport:
    """How a run ended.

    finished  it came to its end; False: stopped, to be resumed
    made_way  between two rollouts because the watcher asked for it: the state is saved, and no stage written
    output    the LoRA file: the best stage, where stages were judged, or the last one; of a run that was stopped the
              last stage; None when there was no update
    verdict   what the checks of its stages say, in sentences; "" without checks
    """

    finished: bool
    made_way: bool
    steps: int
    output: Path | None
    files: RunFiles
    seconds: float
    verdict: str = ""


def train(
    host: Host,
    config: Config,
    prompts: Sequence[str],
    preference: PreferenceModel | None,
    watcher: Watcher | None = None,
    *,
    resume: bool = False,
    loss: RatioLoss | None = None,
    judges: Judges | None = None,
    processes: Processes = ALONE,
) -> TrainingReport:
    """Train a LoRA for the host's checkpoint and write it to `config.run.output`. The network is left as found.

    preference  None only with method dpo and pairs of one's own, which need none; so do `prompts`, then
    resume  go on from the state in the output's run folder; what may have changed meanwhile: `resume.FREE`
    loss    of the pairs' log ratios, in place of the configured one
    judges  who say which stage is the best (see `stages`), which is the output then; None: nobody, and it is the last
    processes  that train together; each calls this with a host of its own, and the main one writes (see `processes`)

    Raises SpoError for what the user can put right: before anything is written, or with the last good state saved.
    """
    watcher, settings, is_dpo = watcher or Watcher(), config.optimizer, config.loss.method == "dpo"
    prompts = prompts_of_pairs(config, prompts) if is_dpo else list(prompts)
    files = RunFiles.of(config.run.output, config.run.run_folder)
    sample_prompts = list(config.run.sample_prompts) or prompts[:4]
    per_update = settings.pairs_per_update * settings.accumulation
    loss = loss or configured_loss(config)
    portions = portions_of(config)
    is_main = processes.index == 0
    taste_to_learn(config, preference)
    if isinstance(preference, LiveTaste) and processes.count > 1:  # each would read other votes, and score otherwise
        raise SpoError(f"A run that learns from votes on the way needs one process, not {processes.count}.")

    # ---- May it begin, or go on? Nothing is touched before.
    facts = run_facts(config, host, stable_seed(*prompts), fingerprint(config.preference.preference))
    facts |= {"run_id": uuid.uuid4().hex, "started_at": time.time()}
    saved = processes.on_main(lambda: load_state(files.state, KIND) if resume else None)
    if saved is None:
        processes.on_main(lambda: check_output(config))
    else:
        check_same_run(saved.facts, facts, allow_other_preference=config.run.allow_other_preference)
        facts |= {key: saved.facts[key] for key in ("run_id", "started_at")}
        if judges and "stages" not in saved.objects:
            if is_main:
                watcher.log("This run was begun without checks of its stages, so it goes on without.")
            judges = None
    validation = config.validation if judges and config.validation.validate_every else None
    checked_prompts = prompts_of_checks(config, prompts) if validation else []
    start = {}
    if config.lora.start_from:
        start = check_matches(read_lora(config.lora.start_from), host.network, host.naming, host.architecture)

    with ExitStack() as leave_as_found:
        # ---- The adapter goes in; every object that must survive a stop stands in `survivors`.
        adapter = configured_adapter(host.network, config, start)
        leave_as_found.callback(adapter.remove)
        if config.lora.reference == "base":
            adapter.use_base_as_reference()
        optimizer = make_optimizer(adapter.parameters(), settings)
        scaler = make_scaler(host.device, host.dtype)
        position, pending, statistics, stages = Position(), PendingPairs(), BatchStatistics(), Stages()
        survivors: dict[str, Stateful] = {
            "lora": adapter,
            "optimizer": optimizer,
            "scaler": scaler,
            "position": position,
            "pending": pending,
            "statistics": statistics,
            **({"stages": stages} if validation else {}),
        }
        live = preference if isinstance(preference, LiveTaste) else None
        if live is not None:
            survivors["taste"] = live
        average = AverageWeights(adapter, config.rollout.rollout_average)
        if average.decay:
            survivors["average"] = average
        window = TeachingWindow(config.rollout.teaching_share)
        if window.share:
            survivors["window"] = window
        if saved is not None:
            saved.restore(survivors)
            pending.to(host.device)
        leave_as_found.enter_context(fast_cuda_math(host.device))
        leave_as_found.enter_context(compiled(host.network, config.model.compile))

        # ---- All prompts are encoded once, those of checks alone apart, so that training's come out as without them;
        # then the run has a folder.
        known = [*dict.fromkeys([*prompts, *sample_prompts])]
        others = [prompt for prompt in checked_prompts if prompt not in known]
        for some in (known, [*known, *others])[: 2 if others else 1]:
            retry_with_less(
                partial(host.prepare, some),
                once_more(),
                watcher.log,
                "shorten the longest prompts, or close other programs",
            )
        metrics: Any = None
        board: Any = None

        def begin_folder() -> None:
            nonlocal metrics, board
            if saved is None and config.run.replace:
                files.delete()
                for stage in stages_of_spo(files):  # or keep_last would count the former run's
                    stage.unlink()
            files.folder.mkdir(parents=True, exist_ok=True)
            metrics = MetricsFile(files.metrics, watcher.log, keep_batches=position.batch if resume else None)
            write_text(files.config, json.dumps(config.flat(), indent=2) + "\n")
            write_text(files.prompts, json.dumps(prompts, indent=1, ensure_ascii=False) + "\n")
            with suppress(ImportError):
                from torch.utils.tensorboard import SummaryWriter

                board = SummaryWriter(str(files.tensorboard), purge_step=position.step)
                leave_as_found.callback(board.close)
            if saved is None:
                save_state(files.state, KIND, facts, survivors)

        processes.on_main(begin_folder)

        began = time.monotonic() - position.seconds
        last_row: dict[str, float] = {}
        check_rows = stages.rows()
        end = stages.over(validation) if validation else ""  # why the checks end the run
        stepping = False  # inside the optimizer's step, when the weights are neither those before nor those after it

        def report(phase: str) -> None:
            fraction = fraction_done(config, position, len(prompts), pending.share_done)
            left_s = seconds_left(position.seconds, fraction)
            watcher.progress(Progress(phase, position.step, position.batch, fraction, left_s, last_row, check_rows))

        def done() -> bool:
            return bool(end) or is_done(config, position, len(prompts))

        def check_due() -> bool:
            return validation is not None and stages.due(position.step, validation.validate_every, done())

        def save() -> None:
            if not is_main:
                return
            write_patiently(lambda: save_state(files.state, KIND, facts, survivors), files.state, watcher.log)

        def write_row() -> None:
            nonlocal last_row
            if not is_main:
                return
            row = statistics.row(position, batches_per_epoch(len(prompts), config), optimizer.param_groups[0]["lr"])
            metrics.add(row)
            last_row = {name: value for name, value in row.items() if isinstance(value, int | float)}
            if board is not None:
                for name, value in last_row.items():
                    board.add_scalar(f"spo/{name}", value, position.step)

        def write_lora_to(path: Path, step: int | None = None) -> bool:
            written = write_patiently(
                lambda: write_stage(path, adapter, host, config, position.step if step is None else step, facts),
                path,
                watcher.log,
            )
            if written:
                watcher.saved(path)
            return written

        def drop_old_stages() -> None:
            if config.run.keep_last:
                for former in files.stages()[: -config.run.keep_last]:
                    if former != files.stage(stages.best_step):
                        former.unlink(missing_ok=True)

        def check() -> None:
            nonlocal end, check_rows
            assert validation is not None
            report("validation")
            found, features = measure(
                host, config, checked_prompts, position.step, preference, judges or Judges(), portions, watcher,
                stages.features, processes,
            )  # fmt: skip
            is_best = stages.add(found, features, adapter.state_dict())
            end = stages.over(validation)
            if not is_main:
                return
            check_rows = stages.rows()
            write_patiently(lambda: write_rows(files.validation, check_rows), files.validation, watcher.log)
            if board is not None:
                for name, value in check_rows[-1].items():
                    board.add_scalar(f"spo_validation/{name}", value, position.step)
            for text in stages.news(validation):
                watcher.log(text)
            if is_best and not done() and not files.stage(position.step).exists():
                write_lora_to(files.stage(position.step))
                drop_old_stages()
            report("validation")

        def sample() -> None:
            if is_main:
                _sample(host, config, sample_prompts, position.step, files, portions, watcher)

        rolled_out = made_way = False
        try:
            # ---- Diffusion-DPO: the pairs of finished pictures, before the first update. Their prompts are the run's.
            if is_dpo:
                finished_ones = finished_pairs(
                    host, config, prompts, preference, files.pairs, portions.prompts, watcher, processes
                )
                prompts = finished_ones.prompts

            if position.step == 0 and config.run.sample_every and not is_done(config, position, len(prompts)):
                sample()
            if resume:
                report("training")  # where it stands, before the first rollout ends

            while True:
                # ---- A check of the stage, where one is due. It may be the last one.
                if check_due():
                    check()
                if done() or any_of(processes, watcher.should_stop()):
                    break

                # ---- Rollout: one batch of pictures, its prompts dealt out, a portion of them at a time. Every process
                # then has all pairs, shuffled over prompts and steps, behind those that the batch before left over.
                if not statistics.images:
                    made_way = any_of(processes, rolled_out and watcher.make_way())
                    if made_way:
                        break
                    rolled_out = True
                    tick = time.monotonic()
                    if live is not None and live.before_rollout(host, config, prompts, position.batch):
                        save()
                    batch_prompts, seeds = batch_of(position.batch, prompts, config)
                    new_pairs: Pairs | None
                    pools: Sequence[PoolScores] = ()
                    if is_dpo:
                        rows = rows_of_batch(position.batch, len(prompts), config)
                        draws = (config.run.seed, "noised", position.batch)
                        new_pairs = noised(finished_ones, rows, draws, config, host)
                    else:
                        assert preference is not None, "this method needs a preference model"
                        of = share_of(processes, range(len(batch_prompts)))
                        mine = partial(
                            roll_out, host, window.narrowed(config, position.batch), [batch_prompts[i] for i in of],
                            [seeds[i] for i in of], preference, portions, watcher,
                        )  # fmt: skip
                        with average.acting():
                            rollout = join_rollouts([one for one in processes.gather(mine if of else _nothing) if one])
                        new_pairs = None if rollout.pairs is None else rollout.pairs.to(host.device)
                        pools = rollout.pools
                        window.learn(pools, position.batch)
                        del rollout
                    statistics.rollout, statistics.images = pool_statistics(pools), len(batch_prompts)
                    position.images += len(batch_prompts)
                    position.fruitless += 1
                    if new_pairs is not None:
                        position.fruitless = 0
                        order = permutation(len(new_pairs), config.run.seed, "pairs", position.batch)
                        pending.add(new_pairs.rows(order), batch_prompts)
                    del new_pairs, pools
                    statistics.rollout_seconds = time.monotonic() - tick
                    report("rollout")
                    if host.device.type != "cpu":
                        free_memory()

                # ---- Update: the gradient of the next pairs, each used once, dealt out; the sum over processes is that
                # of all. Fewer than an update's wait for the next batch, or, where nothing is carried over, make a
                # smaller update.
                last_batch = not settings.steps and is_done(
                    config, dataclasses.replace(position, batch=position.batch + 1), len(prompts)
                )
                enough = 1 if last_batch or not settings.carry_pairs else per_update
                updated = len(pending) >= enough
                if updated:
                    tick = time.monotonic()
                    pairs = pending.first(per_update)
                    fraction = fraction_done(config, position, len(prompts), pending.share_done)
                    rate = learning_rate(
                        settings.learning_rate, settings.schedule, settings.warmup_steps, position.step, fraction
                    )
                    for group in optimizer.param_groups:
                        group["lr"] = rate

                    def gradient(pairs: Pairs = pairs) -> list[PairLoss]:
                        optimizer.zero_grad(set_to_none=True)  # from scratch, so that it can be done again
                        return accumulate_gradient(
                            host, adapter, pairs, pending.prompts, config, loss, portions, scaler,
                            share_of(processes, range(len(pairs))), taste_to_learn(config, preference),
                        )  # fmt: skip

                    def lessened() -> list[PairLoss]:
                        return retry_with_less(
                            gradient, lambda: portions.lessen_training(host), watcher.log, _LESS_MEMORY
                        )

                    for overflows in range(1, SKIPPED_UPDATES + 1):
                        results = [result for some in processes.gather(lessened) for result in some]
                        if not all(bool(torch.isfinite(result.loss).all()) for result in results):
                            raise _not_finite("loss", position, files)
                        processes.sum_gradients(adapter.parameters())
                        scaler.unscale_(optimizer)
                        norm = float(nn.utils.clip_grad_norm_(adapter.parameters(), settings.clip_norm or math.inf))
                        if math.isfinite(norm):
                            break
                        # float16 has overflowed at this scale of the loss: the same pairs again at half of it
                        if not scaler.is_enabled() or overflows == SKIPPED_UPDATES:
                            raise _not_finite("gradient", position, files)
                        scaler.update()

                    stepping = True
                    optimizer_step(optimizer, scaler, adapter, watcher)
                    stepping = False
                    average.update()
                    optimizer.zero_grad(set_to_none=True)
                    statistics.add_results(results)
                    stages.trained([clamped for result in results for clamped in result.clamped.tolist()])
                    statistics.gradient_norms.append(norm)
                    statistics.pairs += len(pairs)
                    pending.drop(len(pairs))
                    position.step += 1
                    position.pairs += len(pairs)
                    statistics.train_seconds += time.monotonic() - tick
                    position.seconds = time.monotonic() - began
                    report("training")

                # ---- End of the batch: its row of metrics. A run that finds no pair ends.
                if len(pending) < enough:
                    write_row()
                    position.batch += 1
                    statistics.load_state_dict(BatchStatistics().state_dict())
                    if position.fruitless >= FRUITLESS_ROLLOUTS and not is_done(config, position, len(prompts)):
                        raise SpoError(
                            f"No pair was kept in the last {position.fruitless} rollouts: best and worst never "
                            f"differed by more than the threshold {config.rollout.threshold:g}; lower it in a new run, "
                            "or use another preference model."
                        )

                # ---- On the way: the state and a stage of the LoRA; pictures.
                if updated:
                    run, step = config.run, position.step
                    save_now = run.save_every and step % run.save_every == 0
                    if is_main and save_now and not is_done(config, position, len(prompts)):
                        save()
                        if write_lora_to(files.stage(step)):
                            drop_old_stages()
                    if (run.sample_every and step % run.sample_every == 0) or (is_main and watcher.sample_now()):
                        sample()
        except StopRequested:
            pass  # in the middle of a rollout, which is done again on resume
        except Exception:
            if not stepping and _weights_are_finite(adapter):
                save()
            raise

        # ---- The end, or a stop: what there is of the LoRA. The output is the best stage, if one is known to be.
        finished = done() and not check_due()
        if finished and statistics.images:
            write_row()
        position.seconds = time.monotonic() - began
        save()

        def write_output() -> Path | None:
            if not position.step or made_way:
                return None
            output = files.output if finished else files.stage(position.step)
            better = stages.best_step if finished and stages.best_step != position.step else 0
            if better:
                write_lora_to(files.stage(position.step))
            weights = {name: value.to(host.device) for name, value in stages.weights.items()} if better else {}
            with adapter.replaced(weights):
                written = write_lora_to(output, better or None)
            if not written:
                raise SpoError(f'"{output}" could not be written; make room there, and resume the run to write it.')
            if finished:
                write_text(files.settings, json.dumps(config.flat(), indent=2) + "\n")
            if better or not finished:
                drop_old_stages()
            return output

        output = processes.on_main(write_output)
        verdict = stages.verdict(position.step, finished=finished) if validation else ""
        return TrainingReport(finished, made_way, position.step, output, files, position.seconds, verdict)


def check_output(config: Config) -> None:
    """SpoError when the output's name, folder or an existing file forbids a new run; writes nothing."""
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


def portions_of(config: Config) -> Portions:
    """What a run of this configuration begins with."""
    rollout, settings = config.rollout, config.optimizer
    return Portions(
        prompts=Portion("prompts_per_call", rollout.prompts_per_call or settings.prompts_per_batch),
        candidates=Portion("candidates_per_call", rollout.candidates_per_call or rollout.candidates),
        judged=Portion("prompts judged at a time", settings.prompts_per_batch),
        pairs=Portion(
            "pairs_per_call", min(settings.pairs_per_call or settings.pairs_per_update, settings.pairs_per_update)
        ),
        checkpointing=config.model.gradient_checkpointing,
    )


def roll_out(
    host: Host,
    config: Config,
    prompts: Sequence[str],
    seeds: Sequence[int],
    preference: PreferenceModel,
    portions: Portions,
    watcher: Watcher,
) -> Rollout:
    """One batch, `portions.prompts` at a time. Raises StopRequested in the middle of it."""
    scored = ScoredInPortions(preference, host, portions, watcher.log)

    def watch(verdict: PoolVerdict) -> None:
        watcher.verdict(verdict)
        if watcher.should_stop():
            raise StopRequested

    def some(rows: range) -> Rollout:
        part = slice(rows.start, rows.stop)
        settings = dataclasses.replace(rollout_settings(config), candidates_per_call=portions.candidates.size)
        return host.rollout(prompts[part], seeds[part], settings, scored, watch)

    count = len(prompts)
    return join_rollouts(
        in_portions(some, count, portions.prompts, watcher.log, _LESS_MEMORY, lessen=portions.lessen_rollout)
    )


def optimizer_step(optimizer: torch.optim.Optimizer, scaler: Any, adapter: Adapter, watcher: Watcher) -> None:
    """The optimizer's step. The first one makes the moments; without room for them, once more with caches emptied."""
    if optimizer.state:
        scaler.step(optimizer)
    else:

        def first_step() -> None:
            with repeatable_first_step(optimizer, adapter.parameters()):
                scaler.step(optimizer)

        advice = "choose optimizer adamw8bit in a new run, or close other programs"
        retry_with_less(first_step, once_more(), watcher.log, advice)
    scaler.update()


def _nothing() -> None:
    """What a process rolls out for which no prompt is left."""


def _sample(
    host: Host,
    config: Config,
    prompts: Sequence[str],
    step: int,
    files: RunFiles,
    portions: Portions,
    watcher: Watcher,
) -> None:
    """One row of pictures at fixed seeds, samples/step000100.png."""
    plain = RolloutSettings(candidates=1, eta=config.rollout.eta)
    seeds = [config.run.sample_seed + i for i in range(len(prompts))]

    def some(rows: range) -> torch.Tensor:
        part = slice(rows.start, rows.stop)
        return host.rollout(prompts[part], seeds[part], plain, None, None).x

    latents = torch.cat(in_portions(some, len(prompts), portions.prompts, watcher.log, _LESS_MEMORY))
    pixels = retry_with_less(lambda: host.decode(latents), lambda: halve_decode_batch(host), watcher.log, _LESS_MEMORY)
    picture = grid([[to_picture(one) for one in pixels]], [f"step {step}"], prompts)
    files.samples.mkdir(exist_ok=True)
    write_patiently(lambda: picture.save(files.sample(step)), files.sample(step), watcher.log)


def _weights_are_finite(adapter: Adapter) -> bool:
    tensors = adapter.state_dict().values()
    return all(value.device.type != "meta" and bool(torch.isfinite(value).all()) for value in tensors)


def _not_finite(what: str, position: Position, files: RunFiles) -> SpoError:
    return SpoError(
        f"The {what} is not finite at update {position.step}; the last good state is saved in {files.folder}. "
        "Lower learning_rate in a new run, or resume with precision bfloat16 or float32."
    )

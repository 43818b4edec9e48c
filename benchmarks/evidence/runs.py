"""One training run on the demo checkpoint, stopped at given costs, judged by the rule: a row for each stop.

Cost is counted in network evaluations: one latent through the UNet once (with guidance a latent counts twice).

    sampling   without gradient and with the adapter acting: rollouts
    reference  without gradient and with the adapter off
    policy     with gradient;  backward: as many again, counted as one each

The judge (`spo.demo.judge`) sees held-out prompts and seeds that no training sees. Its own sampling is not counted.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.evidence import ablations
from spo.algorithm.preference import PreferenceModel
from spo.demo.judge import HERE, held_out
from spo.demo.rule import RULES
from spo.demo.run import demo_config
from spo.demo.subjects import SubjectClassifier
from spo.demo.subjects import load as load_classifier
from spo.files import write_text, write_whole
from spo.headless.compare import adapter_from_file, pictures
from spo.headless.host import HeadlessHost, load_host
from spo.preference.load import load_preference
from spo.progress import Progress, Watcher
from spo.prompts import read_prompts
from spo.runs.layout import RunFiles
from spo.training.finished_pairs import finished_pairs
from spo.training.loop import train
from spo.training.memory import Portion

DPO_PAIRS_PER_PROMPT = 2
JUDGED = 64  # held-out pairs of prompt and seed: 32 prompts, two seeds each


@dataclass(frozen=True)
class Run:
    """One run. Two runs of the same name are the same run.

    experiment, variant  what it belongs to and what its line is called
    changes   settings that differ from the demo preset's
    wrapper   what the product has no setting for, see `ablations`; "" for nothing
    stops     costs in evaluations at which it is judged; the last one ends it
    rule      of `spo.demo.rule`, by which it is judged
    scorer    the preference model that training follows: FOLDER/SCORER.safetensors, which
              `recipes.demo_checkpoint.make_preference` fits; "" for the demo's
    """

    experiment: str
    variant: str
    seed: int
    changes: Mapping[str, Any] = field(default_factory=dict)
    wrapper: str = ""
    stops: tuple[int, ...] = (6300,)
    rule: str = "colourfulness"
    scorer: str = ""

    @property
    def name(self) -> str:
        return f"{self.experiment}--{self.variant}--{self.seed}".replace(" ", "_").replace("/", "_")


@dataclass
class Evaluations:
    """Latents that went through the network, by purpose."""

    sampling: int = 0
    reference: int = 0
    policy: int = 0
    backward: int = 0

    @property
    def total(self) -> int:
        return self.sampling + self.reference + self.policy + self.backward


def count_evaluations(network: torch.nn.Module, counts: Evaluations) -> Any:
    """A hook that adds each call's latents to `counts`; its `remove()` ends the counting."""

    def before(module: torch.nn.Module, inputs: tuple[Any, ...], keywords: Mapping[str, Any]) -> None:
        latents = len(inputs[0] if inputs else keywords["sample"])
        if torch.is_grad_enabled():
            counts.policy += latents
            counts.backward += latents
        elif any(getattr(part, "disable_adapters", False) is True for part in module.modules()):
            counts.reference += latents
        else:
            counts.sampling += latents

    return network.register_forward_pre_hook(before, with_kwargs=True)


class EvidenceJudge:
    """Judges 64 held-out pictures: rule of taste, subject, and how much the two seeds of a prompt differ."""

    def __init__(self, work: Path, rule: str = "colourfulness") -> None:
        self.rule = RULES[rule]
        self.classifier: SubjectClassifier = load_classifier(HERE / "subject_classifier.safetensors")
        self.prompts, self.seeds = held_out(JUDGED)
        self.base = work / "base.safetensors"

    def judge(self, host: HeadlessHost) -> dict[str, list[float]]:
        """taste [64], recognised [64], diversity [32], each rule's value [64] of the network as it is."""
        host.prepare(self.prompts)
        return self.statistics(pictures(host, self.prompts, self.seeds, eta=host.config.rollout.eta))

    def statistics(self, pixels: Tensor) -> dict[str, list[float]]:
        """Of pictures [64, 3, 64, 64]; diversity: 1 - cosine of the classifier's features of both seeds."""
        wanted = torch.tensor([self.classifier.classes.index(prompt) for prompt in self.prompts])
        recognised = (self.classifier.assign(pixels) == wanted).float()
        with torch.no_grad():
            features = self.classifier.network.features(pixels.float()).mean((2, 3))
        first, second = features[: JUDGED // 2], features[JUDGED // 2 :]
        diversity = 1 - torch.nn.functional.cosine_similarity(first, second, dim=1)
        tensors = {"taste": self.rule(pixels), "recognised": recognised, "diversity": diversity}
        tensors |= {name: rule(pixels) for name, rule in RULES.items()}
        return {name: [round(value, 5) for value in values.tolist()] for name, values in tensors.items()}

    def of_base(self, host: HeadlessHost) -> dict[str, list[float]]:
        """The same of the untrained checkpoint, sampled once for all runs."""
        if not self.base.exists():
            host.prepare(self.prompts)
            pixels = pictures(host, self.prompts, self.seeds, eta=1.0)
            write_whole(self.base, lambda temporary: save_file({"pixels": pixels.contiguous()}, temporary))
        return self.statistics(load_file(self.base)["pixels"])


def run_one(run: Run, work: Path) -> Path:
    """FOLDER/NAME.json with what the run cost and how it was judged at each stop. A finished run is not done again."""
    result = work / f"{run.name}.json"
    if not result.exists():
        train_one(run, work, result)
    if judge_stops(result, work):
        facts = json.loads(result.read_text())
        last = facts["rows"][-1]
        taste = [sum(row["judged"]["taste"]) / JUDGED for row in facts["rows"]]
        kept = sum(last["judged"]["recognised"]) / JUDGED
        print(
            f"{run.name}: taste {taste[0]:.4g} -> {', '.join(f'{one:.4g}' for one in taste[1:])}, "
            f"subjects {kept:.0%}, {last['updates']} updates, {sum(last['evaluations'].values())} evaluations, "
            f"{facts['seconds']:.0f} s of training",
            flush=True,
        )
    return result


def train_one(run: Run, work: Path, result: Path) -> None:
    """The run itself; its LoRA at each stop goes to FOLDER/loras, its costs to `result`."""
    folder, loras = work / "runs" / run.name, work / "loras"
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was cut off
    alone = {"sample_every": 0, "save_every": 0, "validate_every": 0, "steps": 1_000_000}  # the rule judges alone
    changes = {"seed": run.seed, "step_weight": "paper", **alone}
    if run.scorer:
        changes["preference"] = str(work / f"{run.scorer}.safetensors")
    config = demo_config(folder, {**changes, **run.changes})
    output = Path(config.run.output)
    for place in (folder, loras):
        place.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    host = load_host(config)
    preference = load_preference(config, host.device, host.architecture)
    if config.loss.method == "dpo":
        shutil.copytree(data_set(host, preference, work), RunFiles.of(output).pairs)
    rows: list[dict[str, Any]] = [{"evaluations": asdict(Evaluations()), "updates": 0, "lora": ""}]
    counts = Evaluations()
    with ExitStack() as while_training:
        preference = ablations.wrapped(run.wrapper, preference, while_training)
        for number, stop in enumerate(run.stops):
            hook = count_evaluations(host.network, counts)
            report = train(
                host, config, read_prompts(config.prompt.prompts), preference, _stops_at(counts, stop),
                resume=number > 0,
            )  # fmt: skip
            hook.remove()
            assert report.output is not None, "no update was made"
            lora = loras / f"{run.name}--{report.steps}.safetensors"
            shutil.copyfile(report.output, lora)
            rows.append({"evaluations": asdict(counts), "updates": report.steps, "lora": lora.name})
    facts = {
        "run": asdict(run), "config": config.flat(), "seconds": time.monotonic() - began, "rows": rows,
        "metrics": RunFiles.of(output).metrics.read_text(),
    }  # fmt: skip
    write_text(result, json.dumps(facts) + "\n")


def judge_stops(result: Path, work: Path, again: bool = False) -> bool:
    """Add what the rule says of each stop to a run's file; whether anything was missing.

    again  also where it is there: the decoder, the classifier or the rule has changed since
    """
    facts = json.loads(result.read_text())
    missing = [row for row in facts["rows"] if again or "judged" not in row]
    if not missing:
        return False
    host = load_host(demo_config(work / "judging", {"seed": facts["run"]["seed"]}))
    judge = EvidenceJudge(work, facts["run"]["rule"])
    for row in missing:
        if not row["lora"]:
            row["judged"] = judge.of_base(host)
            continue
        adapter = adapter_from_file(host, work / "loras" / row["lora"])
        row["judged"] = judge.judge(host)
        adapter.remove()
    write_text(result, json.dumps(facts) + "\n")
    return True


def judge_again(work: Path) -> None:
    """Judge the LoRAs of all finished runs anew, and the untrained checkpoint first."""
    torch.set_num_threads(1)
    (work / "base.safetensors").unlink(missing_ok=True)
    for result in sorted(work.glob("*--*--*.json")):
        judge_stops(result, work, again=True)


def data_set(host: HeadlessHost, preference: PreferenceModel, work: Path) -> Path:
    """FOLDER/dpo_pairs: the pairs that all DPO runs learn from, made once; FOLDER/dpo_pairs.json: what that cost."""
    folder, facts = work / "dpo_pairs", work / "dpo_pairs.json"
    if not facts.exists():
        counts = Evaluations()
        config = demo_config(work / "dpo_making", {"method": "dpo", "pairs_per_prompt": DPO_PAIRS_PER_PROMPT})
        prompts = read_prompts(config.prompt.prompts)
        host.prepare(prompts)
        hook = count_evaluations(host.network, counts)
        made = finished_pairs(host, config, prompts, preference, folder, Portion("prompts", 16), Watcher())
        hook.remove()
        write_text(facts, json.dumps({"pairs": len(made), "evaluations": asdict(counts)}) + "\n")
    return folder


def _stops_at(counts: Evaluations, cost: int) -> Watcher:
    """Ends training after the first update that brings the cost to `cost`; never in the middle of a rollout."""
    enough = False

    def progress(now: Progress) -> None:
        nonlocal enough
        enough = now.phase == "training" and counts.total >= cost

    return Watcher(progress=progress, should_stop=lambda: enough)


def run_all(runs: Sequence[Run], work: Path, seeds: Sequence[int]) -> None:
    """Seed after seed, so that what is cut off is the last seed. A run that fails is told of and left out."""
    torch.set_num_threads(1)
    work.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        for run in runs:
            if run.seed == seed:
                run_one(run, work)
                sys.stdout.flush()

"""Simulated voters on the demo checkpoint: how many votes a taste needs, and whether SPO then follows it.

    python benchmarks/simulated_voters.py STAGE --work FOLDER

Voters follow a rule that can be computed on the finished pictures, with 10 % of their answers flipped; training never
sees the rule. Three tastes, of which the second contradicts the first:

    colourful   Hasler and Suesstrunk's colourfulness (spo/demo/rule.py)
    grey        the same, less is better
    large       the share of the picture that the subject covers

Stages, in order; each keeps what it has in FOLDER and goes on from there:

    pairs     make the pairs: 800 to vote on (the demo's prompts), 400 held out (its held-out prompts)
    features  add noise to them (8 times at random levels; held-out ones once at each measured level), and save what
              other heads than the taste head look at: the UNet's pooled features, and a vision network's of the
              decoded clean prediction
    inputs    accuracy by what a head reads, with 200 and 800 votes
    votes     accuracy by number of votes, for the taste head and the CLIP-style head
    train     SPO with each head for each taste, and the rule's judgement
    rollout   CPU seconds of a rollout with either head
    stages    the judgement of the taste heads' LoRAs at as many updates as the CLIP-style heads' have
    report    docs/taste*.csv and the pictures, from what the other stages left

The CLIP-style head stands in for a step-aware CLIP, whose weights are not at hand: a frozen network that was trained on
pictures of this kind (the demo's subject classifier: all six layers, means and deviations over the picture) looks at
the decoded clean prediction, and a small head on top, which knows the noise level, is fitted to the same votes by the
same recipe. So it needs the denoiser and the VAE for each candidate, as the published preference model does.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from spo.algorithm.diffusion import network_input, training_sigmas
from spo.algorithm.preference import Candidates, PreferenceModel
from spo.demo.judge import HERE, Judge, held_out
from spo.demo.rule import colourfulness
from spo.demo.run import demo_config
from spo.demo.subjects import load as load_classifier
from spo.files import write_text, write_whole
from spo.headless.compare import adapter_from_file, pictures
from spo.headless.host import HeadlessHost, load_host
from spo.images import to_picture
from spo.preference.taste.fit import FitSettings, VoteSet, davidson_loss, fit_member, fit_taste
from spo.preference.taste.head import TasteFacts, TasteHead, TasteNetwork
from spo.prompts import read_prompts
from spo.report.grids import grid
from spo.report.win_rate import win_rate
from spo.rng import generator, stable_seed
from spo.runs.layout import RunFiles
from spo.training.host import rollout_settings
from spo.training.loop import train
from spo.training.vote_pairs import make_pairs

TASTES = ("colourful", "grey", "large")
FLIPPED = 0.1
COUNTS = (50, 100, 200, 400, 800)
TRAINED_VOTES = 200
UPDATES, CLIP_UPDATES = 110, 40  # of the LoRA; decoding every candidate is slow
BATCH = 16
NOISINGS = 8  # of each pair to vote on, for heads whose inputs are slow to make
TIMESTEPS = (1, 201, 401, 601)  # where held-out pairs are judged
PAIRS = {"votes": 800, "held_out": 400}


def pair_prompts(part: str) -> list[str]:
    """The prompt of each pair."""
    prompts = read_prompts(str(HERE / "prompts.txt")) if part == "votes" else list(dict.fromkeys(held_out()[0]))
    order = [prompts[stable_seed(part, number) % len(prompts)] for number in range(PAIRS[part])]
    return order


def make_all_pairs(work: Path) -> None:
    """FOLDER/pairs/PART_BATCH.safetensors: latents [16, 2, 4, 8, 8], pixels [16, 2, 3, 64, 64] uint8."""
    folder = work / "pairs"
    folder.mkdir(parents=True, exist_ok=True)
    host = load_host(demo_config(work))
    for part in PAIRS:
        prompts = pair_prompts(part)
        host.prepare(prompts)
        for first in range(0, len(prompts), BATCH):
            path = folder / f"{part}_{first:04d}.safetensors"
            if path.exists():
                continue
            some = prompts[first : first + BATCH]
            from_step = 2 + first // BATCH % 9
            made = make_pairs(host, some, [stable_seed(part, first + n) % 2**32 for n in range(len(some))], from_step)
            pixels = torch.stack([pair.pixels for pair in made]).clamp(-1, 1)  # the decoder's go a little beyond
            tensors = {
                "latents": torch.stack([pair.latents for pair in made]),
                "pixels": ((pixels + 1) * 127.5).round().byte().contiguous(),
            }
            write_whole(path, lambda temporary, tensors=tensors: save_file(tensors, temporary))
            print(path.name, flush=True)


# ---------------------------------------------------------------------------------------------- what heads look at


class UNetFeatures:
    """Pooled outputs of a diffusers UNet's down and mid blocks at its latest call, of the guided half of the batch."""

    def __init__(self, network: Any) -> None:
        self.parts: list[Tensor] = []
        for block in [*network.down_blocks, network.mid_block]:
            block.register_forward_hook(self._keep)

    def _keep(self, block: Any, inputs: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        guided = hidden[len(hidden) // 2 :]
        self.parts += [guided.mean((2, 3)), guided.flatten(2).std(2)]

    def take(self) -> Tensor:
        """[N, 640]; forgets them."""
        features, self.parts = torch.cat(self.parts, 1), []
        return features


class VisionFeatures:
    """Means and deviations over the picture of every layer of the demo's subject classifier: [N, 1152]."""

    def __init__(self) -> None:
        self.network = load_classifier(HERE / "subject_classifier.safetensors").network

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        parts = []
        for layer in self.network.features:
            pixels = layer(pixels)
            parts += [pixels.mean((2, 3)), pixels.flatten(2).std(2)]
        return torch.cat(parts, 1)


def load_pairs(work: Path, part: str) -> dict[str, Tensor]:
    """All pairs of a part: latents [N, 2, 4, 8, 8], pixels [N, 2, 3, 64, 64] uint8."""
    files = [load_file(path) for path in sorted((work / "pairs").glob(f"{part}_*.safetensors"))]
    return {name: torch.cat([file[name] for file in files]) for name in files[0]}


def make_features(work: Path) -> None:
    """FOLDER/features/PART_NUMBER.safetensors: sigma [N], x [N, 2, 4, 8, 8], unet [N, 2, 640], vision [N, 2, 1152]."""
    folder = work / "features"
    folder.mkdir(parents=True, exist_ok=True)
    host, vision = load_host(demo_config(work)), VisionFeatures()
    unet = UNetFeatures(host.network)
    sigmas = training_sigmas(host.alphas_cumprod).float()
    for part in PAIRS:
        clean, prompts = load_pairs(work, part)["latents"], pair_prompts(part)
        host.prepare(prompts)
        for number in range(NOISINGS if part == "votes" else len(TIMESTEPS)):
            path = folder / f"{part}_{number}.safetensors"
            if path.exists():
                continue
            draw = generator("noise", part, number)
            timesteps = torch.randint(0, 901, (len(clean),), generator=draw)
            if part == "held_out":
                timesteps = torch.full((len(clean),), TIMESTEPS[number])
            sigma = sigmas[timesteps]
            x = clean + sigma[:, None, None, None, None] * torch.randn(clean.shape, generator=draw)
            features: dict[str, list[Tensor]] = {"unet": [], "vision": []}
            for rows in torch.arange(len(clean)).split(32):
                both = [prompts[row] for row in rows.tolist() for _ in range(2)]
                denoised = host.denoiser(
                    x[rows].flatten(0, 1), sigma[rows].repeat_interleave(2), **host.arguments(both)
                )
                features["unet"].append(unet.take())
                features["vision"].append(vision(host.decode(denoised)))
            both_features = {name: torch.cat(parts).unflatten(0, (-1, 2)) for name, parts in features.items()}
            tensors = {"x": x, "sigma": sigma, **both_features}
            write_whole(path, lambda temporary, tensors=tensors: save_file(tensors, temporary))
            print(path.name, flush=True)


# ---------------------------------------------------------------------------------------------- voters


def rule_of(taste: str, pixels: Tensor) -> Tensor:
    """[N] how much pictures [N, 3, H, W] in [-1, 1] please a taste."""
    if taste == "large":
        return (pixels.amin(1) < 0.8).float().mean((1, 2))
    return colourfulness(pixels) * (1 if taste == "colourful" else -1)


def true_answers(taste: str, pixels: Tensor) -> Tensor:
    """[N] 1 where the left of [N, 2, 3, H, W] uint8 pictures pleases more, else 0."""
    left, right = rule_of(taste, pixels.flatten(0, 1).float() / 127.5 - 1).unflatten(0, (-1, 2)).unbind(1)
    return (left > right).float()


@dataclass(frozen=True)
class Voters:
    """Everything about one taste: votes in random order, 10 % flipped, and the truth about held-out pairs.

    order [800] the pairs in the order of voting; answers [800] in that order; held_out [400]; clear [400] bool: the
    held-out pairs that differ by more than their median, which a person could tell apart
    """

    order: Tensor
    answers: Tensor
    held_out: Tensor
    clear: Tensor


def voters(work: Path, taste: str) -> Voters:
    votes, held = load_pairs(work, "votes"), load_pairs(work, "held_out")
    order = torch.randperm(len(votes["latents"]), generator=generator("order"))
    answers = true_answers(taste, votes["pixels"][order])
    flipped = torch.rand(len(order), generator=generator("flipped", taste)) < FLIPPED
    values = rule_of(taste, held["pixels"].flatten(0, 1).float() / 127.5 - 1).unflatten(0, (-1, 2))
    gap = (values[:, 0] - values[:, 1]).abs()
    return Voters(
        order, torch.where(flipped, 1 - answers, answers), (values[:, 0] > values[:, 1]).float(), gap > gap.median()
    )


# ---------------------------------------------------------------------------------------------- heads


class FeatureHead(nn.Module):
    """[N, D] features and [N] sigmas -> [N] scores; features are brought to mean 0 and deviation 1 first."""

    def __init__(self, features: Tensor, hidden: int) -> None:
        super().__init__()
        flat = features.flatten(0, -2)
        self.register_buffer("mean", flat.mean(0))
        self.register_buffer("std", flat.std(0) + 1e-3)
        inputs = flat.shape[1]
        self.noise_level = nn.Linear(1, hidden) if hidden else None
        body = [nn.Linear(inputs, hidden), nn.SiLU(), nn.Linear(hidden, 1)]
        self.body = nn.Sequential(*body) if hidden else nn.Linear(inputs, 1)

    def forward(self, features: Tensor, sigma: Tensor) -> Tensor:
        inputs = (features - self.mean) / self.std
        if self.noise_level is None:
            return self.body(inputs)[:, 0]
        first, rest = self.body[0], self.body[1:]
        return rest(first(inputs) + self.noise_level(sigma.log()[:, None]))[:, 0]


class Reader(nn.Module):
    """A head on the named inputs: "noisy" latents, "unet" features, both, or "vision" features."""

    def __init__(self, inputs: str, example: dict[str, Tensor], hidden: int = 64) -> None:
        super().__init__()
        self.latents = TasteNetwork(FitSettings().width) if "noisy" in inputs else None
        self.kind = "vision" if "vision" in inputs else "unet"
        self.features = FeatureHead(example[self.kind], hidden) if inputs != "noisy" else None

    def forward(self, x: Tensor, sigma: Tensor, features: dict[str, Tensor]) -> Tensor:
        score = self.latents(network_input(x, sigma), sigma) if self.latents is not None else 0
        return score + (self.features(features[self.kind], sigma) if self.features is not None else 0)


def load_features(work: Path, part: str) -> list[dict[str, Tensor]]:
    files = sorted((work / "features").glob(f"{part}_*.safetensors"))
    return [load_file(path) for path in files]


def flat_rows(noising: dict[str, Tensor], rows: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(x, sigma, features) of both pictures of the rows."""
    features = {name: noising[name][rows].flatten(0, 1) for name in ("unet", "vision")}
    return noising["x"][rows].flatten(0, 1), noising["sigma"][rows].repeat_interleave(2), features


def fit_readers(
    inputs: str, noisings: list[dict[str, Tensor]], order: Tensor, answers: Tensor, hidden: int = 64
) -> list[Reader]:
    """Three heads on stored noisings of the pairs in `order`, by the recipe of the taste head."""
    settings, readers = FitSettings(), []
    for member in range(3):
        draw = generator("reader", member)
        torch.manual_seed(member)
        reader = Reader(inputs, {name: noisings[0][name][order] for name in ("unet", "vision")}, hidden)
        optimizer = torch.optim.AdamW(reader.parameters(), weight_decay=settings.weight_decay)
        highest = settings.learning_rate if inputs == "noisy" else 1e-3
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, highest, total_steps=settings.updates)
        for _ in range(settings.updates):
            chosen = torch.randint(len(order), (settings.pairs_per_update,), generator=draw)
            noising = noisings[int(torch.randint(len(noisings), (1,), generator=draw))]
            with torch.enable_grad():
                scores = reader(*flat_rows(noising, order[chosen])).unflatten(0, (-1, 2))
                loss = davidson_loss(scores[:, 0] - scores[:, 1], answers[chosen], torch.tensor(-100.0)).mean()
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
            nn.utils.clip_grad_norm_(reader.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
        readers.append(reader.eval())
    return readers


def reader_differences(readers: list[Reader], noising: dict[str, Tensor]) -> Tensor:
    """[N] score of the left picture less that of the right one."""
    inputs = flat_rows(noising, torch.arange(len(noising["sigma"])))
    scores = torch.stack([reader(*inputs) for reader in readers]).mean(0).unflatten(0, (-1, 2))
    return scores[:, 0] - scores[:, 1]


def taste_differences(head: TasteHead, noising: dict[str, Tensor]) -> Tensor:
    scores = head.member_scores(noising["x"].flatten(0, 1), float(noising["sigma"][0])).mean(0).unflatten(0, (-1, 2))
    return scores[:, 0] - scores[:, 1]


def fit_taste_head(work: Path, taste: str, count: int) -> TasteHead:
    """The product's own fit to the first `count` votes of a taste."""
    voted = voters(work, taste)
    latents = load_pairs(work, "votes")["latents"][voted.order[:count]]
    votes = VoteSet(latents, voted.answers[:count], tuple(map(str, range(count))), "sd15", "demo", "")
    with torch.enable_grad():
        return fit_taste(votes, name=f"{taste} by {count} votes").head


class ClipStyle:
    """The CLIP-style head as a `PreferenceModel`: it decodes the clean prediction of every candidate."""

    name, needs_pixels, needs_denoised = "clip-style", True, True

    def __init__(self, readers: list[Reader]) -> None:
        self.readers, self.vision = readers, VisionFeatures()

    @torch.no_grad()
    def score(self, candidates: Candidates, prompts: Sequence[str]) -> Tensor:
        pixels = candidates.pixels().flatten(0, 1)
        features = {"vision": self.vision(pixels)}
        sigma = torch.full((len(pixels),), max(candidates.sigma, 0.0292))
        x = candidates.x.flatten(0, 1)
        scores = torch.stack([reader(x, sigma, features) for reader in self.readers]).mean(0)
        return scores.unflatten(0, candidates.x.shape[:2])


# ---------------------------------------------------------------------------------------------- stages


@dataclass(frozen=True)
class Row:
    """One accuracy of the tables, 0 ... 1, over all held-out pairs and over those that clearly differ."""

    taste: str
    head: str
    votes: int
    timestep: int
    accuracy: float
    clear_accuracy: float


def rows_of(head: str, taste: str, count: int, voted: Voters, differences: list[Tensor]) -> list[Row]:
    made = []
    for timestep, difference in zip(TIMESTEPS, differences, strict=True):
        right = ((difference > 0).float() == voted.held_out).float()
        made.append(Row(taste, head, count, timestep, float(right.mean()), float(right[voted.clear].mean())))
    return made


def measured(path: Path, key: str, measure: Callable[[], list[Row]]) -> None:
    """Append what `measure` finds to a JSON file of lists by key, unless the key is there already."""
    done = json.loads(path.read_text()) if path.exists() else {}
    if key not in done:
        began = time.monotonic()
        done[key] = [asdict(row) for row in measure()]
        write_text(path, json.dumps(done, indent=1) + "\n")
        accuracies = " ".join(f"{row['accuracy']:.3f}" for row in done[key])
        print(f"{key:40} {accuracies}  {time.monotonic() - began:.1f} s", flush=True)


def measure_inputs(work: Path) -> None:
    noisings, held = load_features(work, "votes"), load_features(work, "held_out")
    heads = {
        "UNet features, linear": ("unet", 0),
        "UNet features": ("unet", 64),
        "noisy latent, stored noise": ("noisy", 0),
        "noisy latent and UNet features, stored noise": ("noisy+unet", 64),
        "decoded prediction, CLIP-style": ("vision", 64),
    }
    for count, taste, name in itertools.product((200, 800), ("colourful", "large"), heads):
        voted = voters(work, taste)

        def measure(count: int = count, taste: str = taste, name: str = name, voted: Voters = voted) -> list[Row]:
            readers = fit_readers(heads[name][0], noisings, voted.order[:count], voted.answers[:count], heads[name][1])
            return rows_of(name, taste, count, voted, [reader_differences(readers, noising) for noising in held])

        measured(work / "inputs.json", f"{count} {taste} {name}", measure)


def measure_votes(work: Path) -> None:
    """Three heads of each kind on the first votes; the taste heads get 200 updates, fewer than the product's 300."""
    clean = load_pairs(work, "votes")["latents"]
    noisings, held = load_features(work, "votes"), load_features(work, "held_out")
    for count, taste in itertools.product((800, 200, 50, 100, 400), ("colourful", "large", "grey")):
        voted = voters(work, taste)

        def by_taste_head(count: int = count, taste: str = taste, voted: Voters = voted) -> list[Row]:
            settings, first = FitSettings(updates=200), voted.order[:count]
            with torch.enable_grad():
                members = [fit_member(clean[first], voted.answers[:count], settings, member) for member in range(3)]
            head = TasteHead(members, TasteFacts())
            return rows_of("taste head", taste, count, voted, [taste_differences(head, noising) for noising in held])

        def by_vision(count: int = count, taste: str = taste, voted: Voters = voted) -> list[Row]:
            readers = fit_readers("vision", noisings, voted.order[:count], voted.answers[:count])
            differences = [reader_differences(readers, noising) for noising in held]
            return rows_of("CLIP-style head", taste, count, voted, differences)

        measured(work / "votes.json", f"{count} {taste} taste head", by_taste_head)
        measured(work / "votes.json", f"{count} {taste} CLIP-style head", by_vision)


def train_all(work: Path) -> None:
    """FOLDER/HEAD_TASTE.safetensors, the LoRAs, and train.safetensors, train.json: pictures and judgements."""
    for head, taste in itertools.product(("taste", "clip"), TASTES):
        train_one(work, head, taste)


def train_one(work: Path, head: str, taste: str) -> None:
    """Train and judge; the taste head's stage at as many updates as the CLIP-style head gets is judged too."""
    output = work / f"{head}_{taste}.safetensors"
    result = work / f"{head}_{taste}.json"
    if result.exists():
        return
    updates = {"taste": UPDATES, "clip": CLIP_UPDATES}[head]
    changes = {"preference": head, "sample_every": 0, "steps": updates, "step_weight": "paper"}
    config = demo_config(work, {"output": str(output), **changes})
    host = load_host(config)
    if head == "taste":
        preference: PreferenceModel = fit_taste_head(work, taste, TRAINED_VOTES)
    else:
        voted, first = voters(work, taste), slice(TRAINED_VOTES)
        preference = ClipStyle(
            fit_readers("vision", load_features(work, "votes"), voted.order[first], voted.answers[first])
        )
    began = time.monotonic()
    if not output.exists():
        with torch.enable_grad():
            train(host, config, read_prompts(config.prompt.prompts), preference, resume=state_of(output).exists())
    judge_lora(work, host, output, head, taste, updates, time.monotonic() - began)


def judge_stages(work: Path) -> None:
    """The taste heads' LoRAs at as many updates as the CLIP-style heads' have."""
    host = load_host(demo_config(work))
    for taste in TASTES:
        stage = work / f"taste_{taste}-step{CLIP_UPDATES:06d}.safetensors"
        if stage.exists() and not stage.with_suffix(".json").exists():
            judge_lora(work, host, stage, "taste", taste, CLIP_UPDATES, float("nan"))


def judge_lora(work: Path, host: HeadlessHost, lora: Path, head: str, taste: str, updates: int, seconds: float) -> None:
    """Write NAME.json and NAME_pictures.safetensors beside the LoRA file NAME.safetensors."""
    prompts, seeds = held_out()
    host.prepare(prompts)
    base = work / "base.safetensors"
    if not base.exists():
        save_file({"pixels": pictures(host, prompts, seeds, eta=host.config.rollout.eta).contiguous()}, base)
    adapter = adapter_from_file(host, lora)
    pixels = pictures(host, prompts, seeds, eta=host.config.rollout.eta)
    adapter.remove()
    save_file({"pixels": pixels.contiguous()}, work / f"{lora.stem}_pictures.safetensors")
    before = load_file(base)["pixels"]
    judge = Judge()
    judged = {
        by: {
            "before": float(rule_of(by, before).mean()),
            "after": float(rule_of(by, pixels).mean()),
            "wins": win_rate(rule_of(by, pixels).tolist(), rule_of(by, before).tolist()).__dict__,
        }
        for by in TASTES
    }
    facts = {
        "head": head,
        "taste": taste,
        "votes": TRAINED_VOTES,
        "updates": updates,
        "seconds": seconds,
        "recognised_before": judge.judge(before, prompts).recognised_share,
        "recognised_after": judge.judge(pixels, prompts).recognised_share,
        "judged": judged,
    }
    write_text(work / f"{lora.stem}.json", json.dumps(facts, indent=1) + "\n")
    print(json.dumps(facts), flush=True)


def time_rollouts(work: Path) -> None:
    """FOLDER/rollout.json: CPU seconds of ten prompts' rollout with either head."""
    host = load_host(demo_config(work))
    prompts = read_prompts(host.config.prompt.prompts)[:10]
    host.prepare(prompts)
    voted, first = voters(work, "colourful"), slice(TRAINED_VOTES)
    taste = TasteHead([TasteNetwork(FitSettings().width) for _ in range(FitSettings().members)], TasteFacts())
    clip = ClipStyle(fit_readers("vision", load_features(work, "votes"), voted.order[first], voted.answers[first]))
    rows = {}
    for name, preference in (("taste head", taste), ("CLIP-style head", clip)):
        began = time.process_time()
        host.rollout(prompts, list(range(10)), rollout_settings(host.config), preference, None)
        rows[name] = time.process_time() - began
    write_text(work / "rollout.json", json.dumps(rows, indent=1) + "\n")
    print(rows)


def state_of(output: Path) -> Path:
    return RunFiles.of(output).state


def report(work: Path) -> None:
    """docs/taste_inputs.csv, taste_votes.csv, taste_votes.png, taste_training.csv, taste_grid.png."""
    docs = Path(__file__).resolve().parent.parent / "docs"
    for name in ("inputs", "votes"):
        path = work / f"{name}.json"
        rows = [row for rows in json.loads(path.read_text()).values() for row in rows] if path.exists() else []
        rows.sort(key=lambda row: (row["taste"], row["head"], row["votes"], row["timestep"]))
        write_csv(docs / f"taste_{name}.csv", rows)
        if name == "votes" and rows:
            draw_votes(rows, docs / "taste_votes.png")
    names = [*trained_names(), *(f"taste_{taste}-step{CLIP_UPDATES:06d}" for taste in TASTES)]
    results = [json.loads((work / f"{name}.json").read_text()) for name in names if (work / f"{name}.json").exists()]
    write_csv(docs / "taste_training.csv", [training_row(result) for result in results])
    draw_grid(work, docs / "taste_grid.png")


def trained_names() -> list[str]:
    return [f"{head}_{taste}" for head, taste in itertools.product(("taste", "clip"), TASTES)]


def training_row(result: dict[str, Any]) -> dict[str, Any]:
    by_own = result["judged"][result["taste"]]
    row = {name: result[name] for name in ("head", "taste", "votes")} | {"updates": result.get("updates", UPDATES)}
    row |= {name: round(by_own[name], 4) for name in ("before", "after")}
    row |= {f"win_{name}": round(by_own["wins"][name], 4) for name in ("rate", "low", "high")}
    row |= {f"{by}_after": round(result["judged"][by]["after"], 4) for by in TASTES}
    return row | {"recognised": round(result["recognised_after"], 4), "seconds": result["seconds"]}


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    if rows:
        lines = [",".join(rows[0]), *(",".join(_cell(value) for value in row.values()) for row in rows)]
        write_text(path, "\n".join(lines) + "\n")


def _cell(value: object) -> str:
    text = f"{value:.4f}" if isinstance(value, float) else str(value)
    text = "" if text == "nan" else text
    return f'"{text}"' if "," in text else text


def draw_votes(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Accuracy against votes, one panel for each taste, one line for each head and noise level."""
    from matplotlib.figure import Figure

    tastes = [taste for taste in TASTES if any(row["taste"] == taste for row in rows)]
    figure = Figure(figsize=(4.6 * len(tastes), 4.2), dpi=110, facecolor="white")
    for number, taste in enumerate(tastes):
        axes = figure.add_subplot(1, len(tastes), number + 1)
        for head, style in (("taste head", "o-"), ("CLIP-style head", "s--")):
            for timestep, colour in zip(TIMESTEPS, ("#1b4f9c", "#3f8fd2", "#e08a1e", "#c0392b"), strict=True):
                points = [
                    (row["votes"], row["accuracy"])
                    for row in rows
                    if (row["taste"], row["head"], row["timestep"]) == (taste, head, timestep)
                ]
                if points:
                    x, y = zip(*sorted(points), strict=True)
                    axes.plot(x, y, style, color=colour, markersize=4, linewidth=1.5, label=f"{head}, t = {timestep}")
        axes.axhline(0.5, color="#667085", linewidth=1, linestyle=":")
        axes.set_xscale("log")
        axes.set_xticks(COUNTS, [str(count) for count in COUNTS])
        axes.minorticks_off()
        axes.set_ylim(0.42, 0.92)
        axes.set_title(f"{taste} is preferred", loc="left", fontsize=12)
        axes.set_xlabel("votes, 10 % flipped")
        axes.grid(True, color="#e4e7ec")
        if number == 0:
            axes.set_ylabel("right about 400 held-out pairs")
            axes.legend(fontsize=7.5, ncol=2, loc="upper left", frameon=False)
    figure.tight_layout()
    write_whole(path, lambda temporary: figure.savefig(temporary, format="png"))


def draw_grid(work: Path, path: Path, columns: int = 10) -> None:
    """Held-out prompts, base and every LoRA there is, with the rule's value under each picture."""
    rows, labels, captions = [], [], []
    prompts, _ = held_out()
    for name in ["base", *trained_names()]:
        file = work / (f"{name}.safetensors" if name == "base" else f"{name}_pictures.safetensors")
        if not file.exists():
            continue
        pixels = load_file(file)["pixels"][:columns]
        colour, cover = colourfulness(pixels).tolist(), rule_of("large", pixels).tolist()
        rows.append([to_picture(picture) for picture in pixels])
        head, _, taste = name.partition("_")
        by = f"taste head, {UPDATES} updates" if head == "taste" else f"CLIP-style head, {CLIP_UPDATES} updates"
        labels.append(f"{taste}, {by}" if taste else "base")
        captions.append([f"colour {c:.0f}, covers {a:.0%}" for c, a in zip(colour, cover, strict=True)])
    made = grid(
        rows, labels, prompts[:columns], captions, title="SPO after 200 votes of simulated voters, 10 % flipped"
    )
    write_whole(path, lambda temporary: made.save(temporary, "PNG"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=list(STAGES))
    parser.add_argument("--work", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with torch.no_grad():
        STAGES[options.stage](options.work)


STAGES = {
    "pairs": make_all_pairs,
    "features": make_features,
    "inputs": measure_inputs,
    "votes": measure_votes,
    "train": train_all,
    "stages": judge_stages,
    "rollout": time_rollouts,
    "report": report,
}


if __name__ == "__main__":
    main()

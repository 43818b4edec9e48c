"""Base against LoRAs, at weights, over prompts and seeds: one grid of the WebUI's own pictures, with scores.

Pictures are ordinary txt2img pictures with `<lora:NAME:weight>` in the prompt, one at a time, so that a picture of the
grid is what the user gets from the same prompt and seed.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from spo.errors import SpoError, nearest
from spo.evaluation.features import Features, choose_features
from spo.evaluation.judges import Judge, as_judge
from spo.evaluation.page import page, statistics_cells, statistics_csv, webp
from spo.evaluation.provenance import Training, training_of
from spo.evaluation.statistics import Measured, measure, together
from spo.evaluation.summary import Column, rows_of, summarize
from spo.files import write_text
from spo.lora.read import check_matches, read_lora
from spo.preference.load import BUNDLED, check_made_for, load
from spo.report.grids import grid
from spo.report.tables import score_table
from spo.training.memory import loaded_scorer, once_more, retry_with_less
from spo.webui import folders
from spo.webui.jobs.job import Job, StatisticsTable, ready_checkpoint, start
from spo.webui.seam import webui

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

MAX_PICTURES = 400
MAX_WEIGHT = 10.0
PAGE_PX = 512  # longer side of a picture on the page
_LESS_MEMORY = "choose a smaller width and height, or no preference model, or close other programs"


@dataclass(frozen=True)
class CompareRequest:
    """What to compare. Columns: the base, then each LoRA at each weight; rows: each prompt with each seed.

    loras       names in the LoRA folder, saved stages too: "vivid", "mine/vivid-step000100"
    preference  a name of `folders.picture_judge_choices`, whose scores stand under the pictures; "": none
    judges      further ones, for the table of statistics and the page
    seeds_each  above 0: so many seeds for each prompt, its own ones (`rows_of`), instead of `seeds`
    width, height  in pixels; 0: the checkpoint's own
    """

    prompts: Sequence[str]
    loras: Sequence[str]
    weights: Sequence[float] = (1.0,)
    seeds: Sequence[int] = (0,)
    seeds_each: int = 0
    preference: str = ""
    judges: Sequence[str] = ()
    negative_prompt: str = ""
    sampler: str = "Euler a"
    steps: int = 20
    guidance_scale: float = 7.0
    width: int = 0
    height: int = 0


@dataclass(frozen=True)
class _Column:
    """label: shown above; tag: added to the prompts."""

    label: str
    tag: str


@dataclass(frozen=True)
class _Plan:
    """A request that has been checked; rows are (prompt, seed).

    judges     name -> what `load` takes, the request's preference first; trainings: of the LoRAs
    """

    request: CompareRequest
    rows: list[tuple[str, int]]
    columns: list[_Column]
    checkpoint: webui.Checkpoint
    width: int
    height: int
    preference: str
    judges: Mapping[str, str]
    trainings: Sequence[Training]

    @property
    def pictures(self) -> int:
        return len(self.rows) * len(self.columns)


@dataclass
class _Results:
    """Pictures, what was measured of them, and scores of the request's preference model by (row, column), as far as
    they are done; infotext: of the first picture, with our notes."""

    pictures: dict[tuple[int, int], Image] = field(default_factory=dict)
    measured: dict[tuple[int, int], Measured] = field(default_factory=dict)
    scores: dict[tuple[int, int], float] = field(default_factory=dict)
    infotext: str = ""
    ended_early: str = ""


def start_comparison(request: CompareRequest) -> Job:
    """Check the request, then compare in the WebUI's queue. Raises SpoError at once for what cannot work."""
    plan = _prepare(request)
    return start("comparison", ", ".join(dict.fromkeys(request.loras)), lambda job: _compare(job, plan))


def _prepare(request: CompareRequest) -> _Plan:
    checkpoint = ready_checkpoint()
    prompts = list(dict.fromkeys(text.strip() for text in request.prompts if text.strip()))
    if not prompts:
        raise SpoError("There are no prompts to compare on; write some, one a line.")
    weights = _weights(request.weights)
    rows = _rows(prompts, request)
    paths = [_lora_path(name) for name in dict.fromkeys(request.loras)]
    if not paths:
        raise SpoError("No LoRA is chosen to compare with the base; choose one or more.")
    count = len(rows) * (1 + len(paths) * len(weights))
    if count > MAX_PICTURES:
        raise SpoError(
            f"{len(prompts)} prompts x {len(rows) // len(prompts)} seeds x {1 + len(paths) * len(weights)} columns are "
            f"{count} pictures; a comparison makes at most {MAX_PICTURES}, so take fewer prompts, seeds, LoRAs or "
            "weights."
        )
    _check_sampling(request)
    for path in paths:
        check_matches(read_lora(path), checkpoint.network, "ldm", checkpoint.architecture)
        _check_known_to_prompts(path)
        for prompt in prompts:
            if path.stem in _loras_named(prompt):
                raise SpoError(f'The prompt "{prompt}" names <lora:{path.stem}>, which is compared; take it out there.')
    judges = {name: folders.picture_judge_path(name) for name in _names(request)}
    for name in judges:
        if name != BUNDLED:  # which scores any latents of SD1.5
            check_made_for(name, checkpoint.file.name)
    columns = [_Column("base", "")] + [
        _Column(f"{folders.lora_name(path)} : {weight:g}", f"<lora:{path.stem}:{weight:g}>")
        for path in paths
        for weight in weights
    ]
    usual_px = folders.usual_size_px(checkpoint.architecture, checkpoint.file.name)
    return _Plan(
        request=request,
        rows=rows,
        columns=columns,
        checkpoint=checkpoint,
        width=_side("width", request.width, usual_px),
        height=_side("height", request.height, usual_px),
        preference=judges.get(request.preference.strip(), ""),
        judges=judges,
        trainings=[training_of(path, folders.run_folder(folders.lora_name(path))) for path in paths],
    )


def _weights(weights: Sequence[float]) -> list[float]:
    for weight in weights:
        if not math.isfinite(weight) or abs(weight) > MAX_WEIGHT:
            raise SpoError(f"weight {weight:g} cannot be used; give numbers from {-MAX_WEIGHT:g} to {MAX_WEIGHT:g}.")
    if not weights:
        raise SpoError("There is no weight to compare at; give one or more, such as 1.")
    return list(dict.fromkeys(float(f"{weight:g}") for weight in weights))


def _rows(prompts: Sequence[str], request: CompareRequest) -> list[tuple[str, int]]:
    """(prompt, seed): the request's seeds with each prompt, or each prompt's own ones."""
    each = request.seeds_each
    if not 0 <= each <= MAX_PICTURES:
        raise SpoError(f"seeds_each is {each}; give 1 to {MAX_PICTURES}, or 0 for the seeds in the list.")
    return rows_of(prompts, [] if each else _seeds(request.seeds), each)


def _names(request: CompareRequest) -> list[str]:
    """Of all judges, each once."""
    given = [name.strip() for name in (request.preference, *request.judges)]
    return list(dict.fromkeys(name for name in given if name))


def _seeds(seeds: Sequence[int]) -> list[int]:
    for seed in seeds:
        if not 0 <= seed < 2**32:
            raise SpoError(f"seed {seed} cannot be used; give whole numbers from 0 to {2**32 - 1}.")
    if not seeds:
        raise SpoError("There is no seed to compare at; give one or more, such as 0.")
    return list(dict.fromkeys(int(seed) for seed in seeds))


def _check_sampling(request: CompareRequest) -> None:
    known = webui.sampler_names(hidden_too=True)
    if request.sampler not in known:
        raise SpoError(f'sampler "{request.sampler}" is not known{nearest(request.sampler, known)}.')
    if not 1 <= request.steps <= 150:
        raise SpoError(f"steps {request.steps} cannot be used; give 1 to 150.")
    if not 1 <= request.guidance_scale <= 100:
        raise SpoError(f"guidance_scale {request.guidance_scale:g} cannot be used; give 1 to 100.")


def _side(name: str, px: int, usual_px: int) -> int:
    if px and (px % 8 or not 64 <= px <= 4096):
        raise SpoError(f"{name} {px} cannot be used; give a multiple of 8 from 64 to 4096, or 0 for the usual size.")
    return px or usual_px


def _lora_path(name: str) -> Path:
    """The file of a name, which may lack its folders where that is unambiguous."""
    files = folders.lora_files()
    wanted = name.strip().removesuffix(".safetensors")
    same_stem = [path for path in files.values() if path.stem == wanted]
    if wanted in files:
        return files[wanted]
    if not same_stem:
        raise SpoError(f'There is no LoRA "{name}" in the LoRA folder{nearest(wanted, files)}.')
    return same_stem[0]


def _check_known_to_prompts(path: Path) -> None:
    """SpoError unless `<lora:STEM:1>` in a prompt means this file and no other."""
    loras = webui.known_loras()
    if loras is None:
        raise SpoError("The WebUI's own Lora extension is switched off; switch it on and restart to compare LoRAs.")
    if re.search(r"[:<>]", path.stem):
        raise SpoError(f'"{path.name}" cannot be named in a prompt because of its : < or >; rename the file.')
    same_stem = [file for file in webui.lora_files(".safetensors", ".pt", ".ckpt") if file.stem == path.stem]
    if len(same_stem) > 1:
        named = " and ".join(f"{folders.lora_name(file)}{file.suffix}" for file in sorted(same_stem))
        raise SpoError(f"Prompts cannot tell {named} apart, as the WebUI goes by the file's name alone; rename one.")
    if path.stem not in loras:
        webui.refresh_loras()
        loras = webui.known_loras() or {}
    if path.stem not in loras or not path.samefile(loras[path.stem].file):
        raise SpoError(f'The WebUI\'s Lora extension does not find "{path.name}"; refresh its tab, or rename the file.')


def _loras_named(prompt: str) -> set[str]:
    return {network.split(":")[1].rstrip(">") for network in webui.networks_of(prompt) if network.startswith("<lora:")}


# ---------------------------------------------------------------------------------------------------- the work itself


def _compare(job: Job, plan: _Plan) -> None:

    if webui.other_left_loaded():
        webui.swap_back()
    checkpoint = webui.loaded_checkpoint()
    if checkpoint.info is not plan.checkpoint.info:
        raise SpoError("The checkpoint was changed while this comparison waited in the queue; start it again.")
    plan = replace(plan, checkpoint=checkpoint)
    judges = []
    for name, path in plan.judges.items():
        job.say(f"Loading the preference model {Path(path).name} ...")
        read = partial(load, path, device=webui.device(), architecture=plan.checkpoint.architecture, finished=True)
        judges.append(as_judge(name, loaded_scorer(read, job.say)))
    features = choose_features("auto", judges, webui.device())
    if job.asked_to_stop():
        job.phase = "stopped"
        return job.say("Stopped before the first picture.")
    job.phase = "working"
    job.say(f"Making {plan.pictures} pictures.")
    with webui.pinned(checkpoint):
        results = _make_pictures(job, plan, judges, features)
    if not results.pictures:
        job.phase = "stopped"
        return job.say("Stopped before the first picture was done; there is no grid.")
    job.picture = job.output = _save(plan, results)
    _write_page(job, plan, results, judges, features)
    if plan.preference:
        scores = {
            column.label: [results.scores.get((row, number)) for row in range(len(plan.rows))]
            for number, column in enumerate(plan.columns)
        }
        job.table = score_table(scores, judges[0].model.name)
    done = f"{len(results.pictures)} of {plan.pictures} pictures, saved as {job.picture.name}"
    if results.ended_early:
        job.phase = "stopped"
        return job.say(f"{results.ended_early}: {done}.")
    job.phase, job.fraction, job.eta_s = "finished", 1.0, 0.0
    job.say(f"Done: {done}.")


def _make_pictures(job: Job, plan: _Plan, judges: Sequence[Judge], features: Features) -> _Results:
    """Column by column, since it is changing a LoRA or its weight that costs the WebUI time."""
    results, began = _Results(), time.time()
    for number, column in enumerate(plan.columns):
        for row, (prompt, seed) in enumerate(plan.rows):
            if job.asked_to_stop():
                results.ended_early = "Stopped"
                return results
            done = number * len(plan.rows) + row
            webui.show_progress(job.fraction, f"picture {done + 1} of {plan.pictures}, {column.label}", job.eta_s)
            draw = partial(_make_picture, plan, f"{prompt} {column.tag}".rstrip(), seed)
            made = retry_with_less(draw, once_more(), job.say, _LESS_MEMORY)
            if not webui.is_loaded(plan.checkpoint):
                results.ended_early = "The checkpoint was switched, so the comparison ended"
                return results
            if made is not None:
                results.pictures[row, number] = made.images[0]
                results.infotext = results.infotext or made.infotext
                work = partial(_measure, judges, features, made, prompt)
                measured = retry_with_less(work, once_more(), job.say, _LESS_MEMORY)
                results.measured[row, number] = measured
                if plan.preference:
                    results.scores[row, number] = float(measured.scores[judges[0].name][0])
            done += 1
            job.step, job.fraction = done, done / plan.pictures
            job.eta_s = (time.time() - began) / done * (plan.pictures - done)
            job.version += 1
    return results


def _make_picture(plan: _Plan, prompt: str, seed: int) -> webui.Pictures | None:
    """One ordinary picture, or None where the user skipped or interrupted it."""
    request = plan.request
    made = webui.txt2img(
        webui.PictureRequest(
            [prompt],
            [seed],
            request.negative_prompt,
            request.steps,
            request.guidance_scale,
            plan.width,
            plan.height,
            sampler=request.sampler,
            notes=_notes(plan),
        )
    )
    if made.interrupted or made.skipped or not made.images:
        return None
    if not made.images[0].convert("RGB").getbbox():  # --disable-nan-check lets them through
        raise SpoError(webui.bad_vae_text(f'made an all black picture of "{prompt}"'))
    return made


def _notes(plan: _Plan) -> dict[str, str]:
    """What the grid's infotext tells besides the first picture's."""
    notes = {"SPO compared": ", ".join(column.label for column in plan.columns)}
    notes["SPO seeds"] = ", ".join(str(seed) for seed in dict.fromkeys(seed for _, seed in plan.rows))
    return notes | ({"SPO preference": Path(plan.preference).name} if plan.preference else {})


def _measure(judges: Sequence[Judge], features: Features, made: webui.Pictures, prompt: str) -> Measured:
    """Of a finished picture, for the prompt without the networks that it names."""
    assert made.latents is not None
    latents = made.latents.detach().float()
    pixels = _pixels(made.images[0]).to(latents.device)
    return measure(pixels[None], latents, [webui.prompt_text(prompt).strip()], judges, features)


def _pixels(picture: Image) -> Tensor:
    """[3, H, W] in [-1, 1]."""
    import numpy as np
    import torch

    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).float() / 127.5 - 1


def _write_page(job: Job, plan: _Plan, results: _Results, judges: Sequence[Judge], features: Features) -> None:
    """The page and its tables beside the grid, of the rows that are there in every column that was begun."""
    begun = sorted({column for _, column in results.measured})
    rows = [row for row in range(len(plan.rows)) if all((row, column) in results.measured for column in begun)]
    if len(begun) < 2 or begun[0] != 0 or not rows:
        return
    columns = {
        plan.columns[number].label: Column(
            together([results.measured[row, number] for row in rows]),
            [webp(_pixels(results.pictures[row, number]), PAGE_PX) for row in rows],
        )
        for number in begun
    }
    request = plan.request
    evaluation = summarize(
        f"{plan.checkpoint.name} against {', '.join(list(columns)[1:])}",
        {
            "Checkpoint": plan.checkpoint.name,
            "Pictures": f"{request.sampler}, {request.steps} steps, CFG scale {request.guidance_scale:g}, "
            f"{plan.width} x {plan.height} px",
        },
        columns,
        [plan.rows[row][0] for row in rows],
        [plan.rows[row][1] for row in rows],
        judges,
        features,
        plan.trainings,
    )
    assert job.picture is not None
    place = job.picture.with_suffix(".html")
    try:
        write_text(place.with_suffix(".csv"), statistics_csv(evaluation))
        write_text(place, page(evaluation))
    except OSError as error:
        return job.say(f'The page "{place}" cannot be written: {error.strerror or error}.')
    job.page, job.statistics = place, StatisticsTable(evaluation.columns, statistics_cells(evaluation))


def _save(plan: _Plan, results: _Results) -> Path:
    """Draw the grid and save it where the WebUI's txt2img grids go, under a new name."""
    rows, columns = range(len(plan.rows)), range(len(plan.columns))
    scored = {place: f"{score:.2f}" for place, score in results.scores.items()}
    sheet = grid(
        [[results.pictures.get((row, column)) for column in columns] for row in rows],
        [f"{prompt}\nseed {seed}" for prompt, seed in plan.rows],
        [column.label for column in plan.columns],
        [[scored.get((row, column), "") for column in columns] for row in rows] if scored else None,
    )
    prompt, seed = plan.rows[0]
    return webui.save_grid(sheet, prompt, seed, results.infotext)

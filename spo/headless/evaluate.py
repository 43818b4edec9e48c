"""Base against LoRAs and stages on held-out prompts: judged, measured, and shown on one page."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from spo.config import Config
from spo.errors import SpoError
from spo.evaluation.features import Features, choose_features
from spo.evaluation.judges import Judge, load_judge
from spo.evaluation.page import page, pictures_csv, statistics_csv, statistics_rows, webp
from spo.evaluation.provenance import training_of
from spo.evaluation.statistics import Measured, measure, together
from spo.evaluation.summary import Column, Evaluation, summarize
from spo.files import write_text
from spo.headless.compare import LESS_MEMORY, adapter_from_file, check_writable, plain_rollout
from spo.headless.host import load_host
from spo.report.tables import table
from spo.runs.layout import FOLDER_SUFFIX, RunFiles
from spo.training.best_weight import best_column, choosing_judge, scalable, write_scaled
from spo.training.host import Host
from spo.training.memory import Portion, in_portions, loaded_scorer
from spo.training.processes import ALONE, Processes, share_of

FOLDER_FILES = ("index.html", "statistics.csv", "pictures.csv")


@dataclass(frozen=True)
class EvaluateRequest:
    """What is evaluated, besides the configuration's model, rollout and output.

    loras       files; each at each of `weights`
    judges      names or files of models of the catalogue
    distance    what pictures are compared by, see `features.choose_features`
    scaled      a LoRA file to write: the best of `loras` scaled to its best weight; None: none
    largest_px  longer side of a picture on the page
    """

    prompts: Sequence[str]
    seeds: Sequence[int]
    loras: Sequence[Path]
    weights: Sequence[float]
    judges: Sequence[str]
    distance: str = "auto"
    scaled: Path | None = None
    largest_px: int = 512
    batch: int = 16


def lora_files_of(folder: Path) -> list[Path]:
    """The stages of a run's folder NAME.spo, oldest first, and its LoRA. Raises SpoError where there are none."""
    if not folder.is_dir() or folder.suffix != FOLDER_SUFFIX:
        raise SpoError(f'run "{folder}" is no run\'s folder; give the NAME{FOLDER_SUFFIX} that lies beside a LoRA.')
    files = RunFiles(folder.with_suffix(".safetensors"), folder)
    found = [*files.stages(), *([files.output] if files.output.is_file() else [])]
    if not found:
        raise SpoError(f'there is no "{files.output.name}" and no stage of it beside "{folder}".')
    return found


def evaluate(config: Config, request: EvaluateRequest, processes: Processes = ALONE) -> str:
    """Write the page and two tables to `config.run.output`, a NAME.html (tables beside it) or a folder; the table and
    which LoRA at which weight is the best as text. Raises SpoError for what cannot work, before anything is sampled.

    processes  among which the pictures are dealt out; the main one writes
    """
    output = Path(config.run.output)
    _check_output(output, config.run.replace)
    if not request.prompts or not request.loras:
        raise SpoError("There is nothing to evaluate; give prompts, and a LoRA with --lora or a run with --run.")
    trainings = [training_of(path) for path in request.loras]
    scalables = {path: scalable(path, request.scaled) for path in request.loras} if request.scaled else {}
    host = load_host(config)
    judges = [_loaded(name, config, host) for name in dict.fromkeys(request.judges)]
    chooser = choosing_judge(judges, trainings)
    if request.scaled and chooser is None:
        raise SpoError("No judge is given that training did not follow, by which to scale; name one with --judge.")
    features = choose_features(request.distance, judges, host.device)
    host.prepare(list(dict.fromkeys(request.prompts)))
    columns = {"base": _column(host, config, request, judges, features, processes, is_base=True)}
    made: dict[str, tuple[Path, float]] = {}  # label -> LoRA and weight
    for path in request.loras:
        adapter = adapter_from_file(host, path)
        for weight in request.weights:
            adapter.set_multiplier(weight)
            label = _label(path, weight, request)
            columns[label] = _column(host, config, request, judges, features, processes)
            made[label] = (path, weight)
        adapter.remove()

    def write() -> str:
        choice = None
        if chooser is not None:
            measured = {label: column.measured for label, column in columns.items()}
            choice = best_column(measured, request.prompts, chooser, judges, features)
        others = ", ".join(made)
        evaluation = summarize(
            f"{host.checkpoint_name} against {others}",
            _facts(config, host) | ({"Choice": choice.text()} if choice else {}),
            columns,
            request.prompts,
            request.seeds,
            judges,
            features,
            trainings,
        )
        _write(evaluation, output, config.run.replace)
        texts = [table(statistics_rows(evaluation), ["", *evaluation.columns])]
        if choice is not None:
            texts.append(choice.text())
            if request.scaled and (choice.gain is None or choice.gain.mean <= 0):
                texts.append(f"{request.scaled.name} is not written: nothing is better than the base.")
            elif request.scaled:
                path, weight = made[choice.label]
                write_scaled(scalables[path], weight, request.scaled)
                texts.append(f"{request.scaled.name} does at weight 1 what {path.stem} does at {weight:g}.")
        return "\n\n".join(texts)

    return processes.on_main(write)


def _check_output(output: Path, replace: bool) -> None:
    if output.suffix and output.suffix.lower() != ".html":
        raise SpoError(f'output is "{output}"; evaluate writes NAME.html, or a folder without an ending.')
    for path in [output] if not output.suffix else _files(output):
        check_writable(path, replace)
        if path.exists() and path.is_dir() != (not output.suffix):
            raise SpoError(f'"{path}" is {"a folder" if path.is_dir() else "a file"}; choose another name.')
    if output.is_dir() and any(output.iterdir()) and not (output / FOLDER_FILES[0]).is_file():
        raise SpoError(f'"{output}" holds other files than an evaluation; choose another folder.')


def _files(output: Path) -> list[Path]:
    """The page and its tables, from a NAME.html."""
    return [output, output.with_suffix(".csv"), output.with_name(f"{output.stem}_pictures.csv")]


def _loaded(name: str, config: Config, host: Host) -> Judge:
    def load() -> Judge:
        return load_judge(
            name,
            host.device,
            host.architecture,
            checkpoint_name=host.checkpoint_name,
            precision=config.preference.preference_precision,
            rest_on_cpu=config.model.rest_on_cpu,
        )

    return loaded_scorer(load, warnings.warn)


def _column(
    host: Host,
    config: Config,
    request: EvaluateRequest,
    judges: Sequence[Judge],
    features: Features,
    processes: Processes = ALONE,
    *,
    is_base: bool = False,
) -> Column:
    """Sample, measure and encode a few pictures at a time, so that no more of them than these are ever in memory."""
    different = list(dict.fromkeys(request.prompts))
    following = dict(zip(different, [*different[1:], *different[:1]], strict=True))

    def some(rows: range) -> tuple[Measured, list[bytes]]:
        part = slice(mine.start + rows.start, mine.start + rows.stop)
        prompts = request.prompts[part]
        latents = plain_rollout(host, prompts, request.seeds[part], config.rollout.eta).x
        pixels = host.decode(latents).clamp(-1, 1)
        encoded = [webp(picture, request.largest_px) for picture in pixels]
        others = [following[prompt] for prompt in prompts] if is_base else []
        return measure(pixels, latents, prompts, judges, features, others), encoded

    def all_mine() -> list[tuple[Measured, list[bytes]]]:
        portion = Portion("pictures at a time", request.batch)
        return in_portions(some, len(mine), portion, warnings.warn, LESS_MEMORY)

    mine = share_of(processes, range(len(request.prompts)))
    parts = [part for share in processes.gather(all_mine) for part in share]
    return Column(together([part for part, _ in parts]), [picture for _, some in parts for picture in some])


def _label(path: Path, weight: float, request: EvaluateRequest) -> str:
    twice = sum(other.stem == path.stem for other in request.loras) > 1
    name = f"{path.parent.name}/{path.stem}" if twice else path.stem
    return name if list(request.weights) == [1.0] else f"{name} : {weight:g}"


def _facts(config: Config, host: Host) -> dict[str, str]:
    rollout = config.rollout
    return {
        "Checkpoint": f"{host.checkpoint_name} ({host.checkpoint_hash[:10]})",
        "Pictures": f"{rollout.sampling_steps} steps ({rollout.sigmas}), eta {rollout.eta:g}, guidance scale "
        f"{rollout.guidance_scale:g}",
    }


def _write(evaluation: Evaluation, output: Path, replace: bool) -> None:
    """Whole or not at all: the page last, of a folder all at once."""
    texts = [page(evaluation), statistics_csv(evaluation), pictures_csv(evaluation)]
    try:
        if output.suffix:
            for path, text in reversed(list(zip(_files(output), texts, strict=True))):
                write_text(path, text)
            return
        with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.absolute().parent) as place:
            made, former = Path(place) / "made", Path(place) / "former"
            made.mkdir()
            for name, text in zip(FOLDER_FILES, texts, strict=True):
                write_text(made / name, text)
            if output.exists():
                output.rename(former)
            made.rename(output)
    except OSError as error:
        raise SpoError(f'"{output}" cannot be written: {error.strerror or error}.') from error

"""What a run needs to go on exactly where it stopped, in one file that is written whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spo.errors import SpoError
from spo.files import write_whole

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = 1


@dataclass(frozen=True)
class RunState:
    """The state between two optimizer updates.

    tensors  by name: `lora/...`, `optimizer/...`, `pending/...` (pairs of the current rollout not yet trained on)
    facts    what JSON holds: position (epoch, batch, update), gradient scaler, statistics so far, configuration, ids
    """

    tensors: Mapping[str, Tensor]
    facts: Mapping[str, Any]


def save_state(path: Path, state: RunState) -> None:
    """Write `state` to `path`, whole or not at all; the former file stays until the new one is on disk."""
    from safetensors.torch import save_file

    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in state.tensors.items()}
    metadata = {"spo_state": json.dumps({"format": FORMAT, **state.facts})}
    write_whole(path, lambda temporary: save_file(tensors, temporary, metadata))


def load_state(path: Path) -> RunState:
    """Read what `save_state` wrote, on the CPU. Raises SpoError for a missing, damaged or foreign file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {})["spo_state"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except FileNotFoundError as error:
        raise SpoError(f'there is no run to resume: "{path}" does not exist.') from error
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise SpoError(
            f'"{path}" is damaged or is not the state of a run ({error}); start anew with --replace.'
        ) from error
    if facts.get("format") != FORMAT:
        raise SpoError(
            f'"{path}" was written by another version (format {facts.get("format")}, this one reads {FORMAT}).'
        )
    return RunState(tensors, facts)


def flatten(value: Any, prefix: str, tensors: dict[str, Tensor]) -> Any:
    """Take the tensors out of nested dicts and lists (an optimizer's state dict) into `tensors`; JSON remains.

    Dicts become lists of [key, value], since JSON's keys are texts and an optimizer's are numbers. Undone by `restore`.
    """
    import torch

    if isinstance(value, torch.Tensor):
        tensors[prefix] = value
        return {"tensor": prefix}
    if isinstance(value, dict):
        return {"items": [[key, flatten(entry, f"{prefix}/{key}", tensors)] for key, entry in value.items()]}
    if isinstance(value, list | tuple):
        entries = [flatten(entry, f"{prefix}/{index}", tensors) for index, entry in enumerate(value)]
        return {"tuple": entries} if isinstance(value, tuple) else entries
    return value


def restore(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of `flatten`."""
    if isinstance(value, list):
        return [restore(entry, tensors) for entry in value]
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[value["tensor"]]
    if "tuple" in value:
        return tuple(restore(entry, tensors) for entry in value["tuple"])
    return {key: restore(entry, tensors) for key, entry in value["items"]}


def keep_newest(paths: Sequence[Path], count: int) -> None:
    """Delete all but the last `count` of `paths` (oldest first); 0 keeps all."""
    if count:
        for path in paths[:-count]:
            path.unlink(missing_ok=True)

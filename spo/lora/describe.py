"""What is in a LoRA file, in a few lines for people."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from spo.checkpoint.kinds import TITLE
from spo.lora.read import LoraFile

_KINDS = {
    "self-attention": r"_attn1_",
    "cross-attention": r"_attn2_",
    "feed-forward": r"_ff_net_",
    "projection": r"_proj_(in|out)$",
    "residual block": r"_(conv[12]|time_emb_proj|conv_shortcut|in_layers_2|emb_layers_1|out_layers_3|skip_connection)$",
    "resampling": r"samplers_0_conv$|_op$|_blocks_\d+_\d_conv$",
}


@dataclass(frozen=True)
class LoraDescription:
    """What `spo inspect` tells of a LoRA file.

    ranks, alphas   value -> how many layers have it
    kinds           kind of module -> layers
    norm            Frobenius norm of all changes of weights together; zero_layers: layers that change nothing
    facts           what the metadata tells: label -> text, only what is there
    """

    name: str
    architecture: str
    dtype: str
    size_bytes: int
    ranks: Mapping[int, int]
    alphas: Mapping[float, int]
    kinds: Mapping[str, int]
    text_encoder_layers: int
    norm: float
    zero_layers: int
    facts: Mapping[str, str]

    def text(self) -> str:
        """Short lines, a label and its value each."""
        size = f"{self.size_bytes / 1e6:.1f} MB" if self.size_bytes >= 1e5 else f"{self.size_bytes / 1e3:.1f} kB"
        effect = f"norm of all changes {self.norm:.4g}"
        effect += f", {self.zero_layers} layers change nothing" if self.zero_layers else ""
        rows = {
            "file": f"{self.name}, {size}, {self.dtype}",
            "kind": f"LoRA for {TITLE[self.architecture]}",
            "layers": ", ".join(f"{count} {kind}" for kind, count in self.kinds.items()),
            "text encoder": f"{self.text_encoder_layers} layers, not used by SPO" if self.text_encoder_layers else "",
            "rank": _counted(self.ranks),
            "alpha": _counted(self.alphas),
            "effect": effect,
            **self.facts,
        }
        return "\n".join(f"{label + ':':<14} {value}" for label, value in rows.items() if value)


def describe(file: LoraFile) -> LoraDescription:
    """Facts about a file that was read, for people."""
    norms = [layer.norm() for layer in file.layers.values()]
    return LoraDescription(
        name=file.path.name,
        architecture=file.architecture,
        dtype=file.dtype,
        size_bytes=file.size_bytes,
        ranks=Counter(layer.rank for layer in file.layers.values()),
        alphas=Counter(layer.alpha for layer in file.layers.values()),
        kinds=dict(Counter(map(_kind, file.layers)).most_common()),
        text_encoder_layers=len(file.text_encoder_layers),
        norm=math.hypot(*norms),
        zero_layers=sum(norm == 0 for norm in norms),
        facts=_stated(file.metadata),
    )


def _kind(name: str) -> str:
    return next((kind for kind, pattern in _KINDS.items() if re.search(pattern, name)), "other")


def _counted(values: Mapping[int, int] | Mapping[float, int]) -> str:
    if len(values) == 1:
        return f"{next(iter(values)):g}"
    return ", ".join(f"{value:g} ({count} layers)" for value, count in sorted(values.items()))


def _stated(metadata: Mapping[str, str]) -> dict[str, str]:
    labels = {
        "prompt alias": "ss_output_name",
        "checkpoint": "ss_sd_model_name",
        "model hash": "ss_sd_model_hash",
        "steps": "ss_steps",
        "learning rate": "ss_learning_rate",
        "seed": "ss_seed",
        "prediction": "modelspec.prediction_type",
        "date": "modelspec.date",
        "hash": "sshs_model_hash",
        "SPO version": "spo_version",
    }
    return {label: metadata[key] for label, key in labels.items() if metadata.get(key) not in (None, "", "None")}

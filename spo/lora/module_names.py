"""Names of a UNet's modules: two styles inside networks, and what LoRA files call them. Strings only, no torch.

    diffusers   down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q
    ldm (sgm)   input_blocks.4.1.transformer_blocks.0.attn1.to_q
    file        lora_unet_ + the name with underscores for dots: the diffusers name for SD1.5, the ldm name for SDXL

The layout is that of every Stable Diffusion 1.x and SDXL network: two residual blocks a level on the way down, three on
the way up; any number of levels; attention on any of them. Underscores are never turned back into dots by guessing: a
file's name finds its module among those of the real network, and between the two styles of file names one grammar
translates block numbers and the few leaves that differ.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import Literal

from spo.errors import SpoError

Style = Literal["diffusers", "ldm"]

FILE_PREFIX = "lora_unet_"
FILE_STYLE: dict[str, Style] = {"sd15": "diffusers", "sdxl": "ldm"}

_BLOCKS = 3  # ldm blocks a level: down two residual blocks and the downsampler, up three residual blocks
_OUTER = {  # diffusers -> ldm
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_RESNET = {  # diffusers -> ldm, inside a residual block
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_FIRST = re.compile(
    r"(?P<diffusers>down_blocks|mid_block|up_blocks|conv_in|conv_norm_out|conv_out|time_embedding|add_embedding)(?![a-z])"
    r"|(?P<ldm>input_blocks|middle_block|output_blocks|out|time_embed|label_emb)(?![a-z])"
)


def to_diffusers(module: str) -> str:
    """The diffusers name of `module`, which may have either style. Raises SpoError for other names."""
    return _known(module, _to_diffusers(module, "."))


def to_ldm(module: str, network: Collection[str] | None = None) -> str:
    """The ldm name of `module`, which may have either style. Raises SpoError for other names.

    network  all module names of the network, in the same style: in ldm an upsampler's number tells whether attention
             stands before it. None: it does, as in SDXL.
    """
    upsampler = 2
    level = re.match(r"up_blocks\.(\d+)\.upsamplers\.", module)
    if level and network is not None:
        attention = f"up_blocks.{level[1]}.attentions."
        upsampler = 2 if any(name.startswith(attention) for name in network) else 1
    return _known(module, _to_ldm(module, ".", upsampler))


def file_name(module: str, naming: Style | str, architecture: str, network: Collection[str] | None = None) -> str:
    """What a LoRA file for `architecture` calls the module: `lora_unet_...`, without a suffix.

    naming   style of `module`
    network  all module names of the network, in that style; None: as in SDXL, see `to_ldm`

    Raises SpoError for a name that is not of that style, an unknown style or architecture.
    """
    if architecture not in FILE_STYLE:
        raise SpoError(f'architecture "{architecture}" is not known; choose from {", ".join(FILE_STYLE)}.')
    if naming not in FILE_STYLE.values():
        raise SpoError(f'naming "{naming}" is not known; choose from {", ".join(FILE_STYLE.values())}.')
    if _style(module) != naming:
        raise SpoError(f'"{module}" is not a module of a Stable Diffusion UNet in {naming} naming.')
    name = to_diffusers(module) if FILE_STYLE[architecture] == "diffusers" else to_ldm(module, network)
    return FILE_PREFIX + name.replace(".", "_")


def modules_by_file_name(network: Iterable[str], naming: Style | str, architecture: str) -> dict[str, str]:
    """File name -> module name for a whole network, the inverse of `file_name`.

    network  names of all linear and convolution modules; those that are no part of a UNet are left out

    Raises SpoError for a name that is not of that style, or for two modules that a file could not tell apart.
    """
    names = tuple(network)
    modules: dict[str, str] = {}
    for module in names:
        if _style(module) is None:
            continue
        key = file_name(module, naming, architecture, names)
        if modules.setdefault(key, module) != module:
            raise SpoError(f'A LoRA file would give "{module}" and "{modules[key]}" the same name.')
    return modules


def canonical_file_name(name: str, architecture: str) -> str | None:
    """The name that `file_name` gives, for a `lora_unet_` name of either style; None when it is no UNet module's.

    An upsampler of an SDXL file in diffusers style is taken to stand behind attention, as it does in SDXL.
    """
    if not name.startswith(FILE_PREFIX):
        return None
    inner = name.removeprefix(FILE_PREFIX)
    canonical = _to_diffusers(inner, "_") if FILE_STYLE[architecture] == "diffusers" else _to_ldm(inner, "_", 2)
    return None if canonical is None else FILE_PREFIX + canonical


def file_name_style(name: str) -> Style | None:
    """Which style a `lora_unet_` name is made from; None when from neither."""
    return _style(name.removeprefix(FILE_PREFIX)) if name.startswith(FILE_PREFIX) else None


def _known(module: str, translated: str | None) -> str:
    if translated is None:
        raise SpoError(f'"{module}" is not a module of a Stable Diffusion UNet in diffusers or ldm naming.')
    return translated


def _style(name: str) -> Style | None:
    first = _FIRST.match(name)
    if first is None:
        return None
    return "diffusers" if first["diffusers"] else "ldm"


def _to_ldm(name: str, dot: str, upsampler: int) -> str | None:
    """`dot` stands between the parts of the name, "." in networks and "_" in files."""
    if _style(name) != "diffusers":
        return name if _to_diffusers(name, dot) else None
    for diffusers, ldm in _OUTER.items():
        if name == diffusers.replace(".", dot):
            return ldm.replace(".", dot)
    d = re.escape(dot)
    match = re.fullmatch(rf"(?:(down|up)_blocks{d}(\d+)|mid_block){d}([a-z]+){d}(\d+){d}(.+)", name)
    if match is None:
        return None
    side, level, kind, index, leaf = match[1] or "mid", int(match[2] or 0), match[3], int(match[4]), match[5]
    if kind == "resnets":
        leaf = _translate(leaf, _RESNET, dot)
    place = {
        ("down", "resnets"): (index < 2, f"input_blocks.{1 + _BLOCKS * level + index}.0"),
        ("down", "attentions"): (index < 2, f"input_blocks.{1 + _BLOCKS * level + index}.1"),
        ("down", "downsamplers"): (index == 0 and leaf == "conv", f"input_blocks.{_BLOCKS * (level + 1)}.0"),
        ("mid", "resnets"): (index < 2, f"middle_block.{2 * index}"),
        ("mid", "attentions"): (index == 0, "middle_block.1"),
        ("up", "resnets"): (index < 3, f"output_blocks.{_BLOCKS * level + index}.0"),
        ("up", "attentions"): (index < 3, f"output_blocks.{_BLOCKS * level + index}.1"),
        ("up", "upsamplers"): (index == 0 and leaf == "conv", f"output_blocks.{_BLOCKS * level + 2}.{upsampler}"),
    }.get((side, kind))
    if place is None or not place[0] or not leaf:
        return None
    return place[1].replace(".", dot) + dot + ("op" if kind == "downsamplers" else leaf)


def _to_diffusers(name: str, dot: str) -> str | None:
    if _style(name) != "ldm":
        return name if _style(name) == "diffusers" and _to_ldm(name, dot, 2) else None
    for diffusers, ldm in _OUTER.items():
        if name == ldm.replace(".", dot):
            return diffusers.replace(".", dot)
    d = re.escape(dot)
    match = re.fullmatch(rf"(?:(input|output)_blocks{d}(\d+)|middle_block){d}(\d+){d}(.+)", name)
    if match is None:
        return None
    side, block, part, leaf = match[1] or "middle", int(match[2] or 0), int(match[3]), match[4]
    level, index = divmod(block - 1 if side == "input" else block, _BLOCKS)
    if side == "middle":
        place = {0: "mid_block.resnets.0", 1: "mid_block.attentions.0", 2: "mid_block.resnets.1"}.get(part)
        kind = "attentions" if part == 1 else "resnets"
    elif side == "input" and index == 2:
        place, kind = (f"down_blocks.{level}.downsamplers.0" if part == 0 and leaf == "op" and level >= 0 else None), ""
        leaf = "conv"
    elif side == "output" and index == 2 and part in (1, 2) and leaf == "conv":
        place, kind = f"up_blocks.{level}.upsamplers.0", ""
    else:
        kind = {0: "resnets", 1: "attentions"}.get(part, "")
        place = f"{'down' if side == 'input' else 'up'}_blocks.{level}.{kind}.{index}" if kind else None
    if kind == "resnets":
        leaf = _translate(leaf, {ldm: diffusers for diffusers, ldm in _RESNET.items()}, dot)
    if place is None or not leaf:
        return None
    return place.replace(".", dot) + dot + leaf


def _translate(leaf: str, table: dict[str, str], dot: str) -> str:
    """The other style's name of a residual block's leaf, "" when there is none."""
    return {source.replace(".", dot): target.replace(".", dot) for source, target in table.items()}.get(leaf, "")

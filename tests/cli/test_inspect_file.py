"""`spo inspect`: the file's content decides who describes it, never the words of somebody's error."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from spo.cli.inspect_file import describe_file
from spo.errors import SpoError
from spo.lora.metadata import lora_metadata
from spo.lora.write import write_lora
from spo.preference.load import BUNDLED, BUNDLED_FILES
from tests.loras import FACTS, two_layers
from tests.tiny_checkpoints import tiny_sd15, write_diffusers_folder, write_tiny_sd15, write_vae


def test_what_spo_works_with(tmp_path: Path) -> None:
    write_lora(tmp_path / "a.safetensors", two_layers(), lora_metadata("a", FACTS))
    assert "LoRA for Stable Diffusion 1.5" in describe_file(tmp_path / "a.safetensors")
    assert "latent CNN" in describe_file(BUNDLED_FILES[BUNDLED])
    for path in (write_tiny_sd15(tmp_path / "b.safetensors"), write_diffusers_folder(tmp_path / "folder", tiny_sd15())):
        assert "architecture  Stable Diffusion 1.5 (sd15)" in describe_file(path)


def test_a_name_does_not_decide(tmp_path: Path) -> None:
    """A damaged checkpoint called LoRA was once "a whole checkpoint; what is read here are LoRA files"."""
    tensors = {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(32, 4, 3, 3)}
    tensors["model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"] = torch.zeros(32, 768)
    save_file(tensors, tmp_path / "my LoRA merge.safetensors")
    with pytest.raises(SpoError, match="irregular layout"):
        describe_file(tmp_path / "my LoRA merge.safetensors")


def test_a_damaged_lora_is_called_a_lora(tmp_path: Path) -> None:
    save_file({"lora_unet_x.lora_down.weight": torch.ones(2, 4)}, tmp_path / "half.safetensors")
    with pytest.raises(SpoError, match="is incomplete: its layer .* has no up"):
        describe_file(tmp_path / "half.safetensors")


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (["lora_unet_x.hada_w1_a"], "a LoHa file (LyCORIS)"),
        (["control_model.input_blocks.0.0.weight"], "a ControlNet"),
        (["emb_params"], "a textual inversion embedding"),
        (["model.0.weight", "model.1.sub.0.RDB1.conv1.0.weight"], "an upscaler"),
        (["1.weight", "3.conv.0.weight"], "a TAESD"),
        (["vision_model.x", "visual_projection.weight"], "a CLIP"),
        (["a.b", "a.c", "a.d"], "something else (its first tensors: a.b, a.c, a.d)"),
    ],
)
def test_other_files_are_named(tmp_path: Path, names: list[str], kind: str) -> None:
    save_file({name: torch.zeros(2, 2) for name in names}, tmp_path / "x.safetensors")
    lines = describe_file(tmp_path / "x.safetensors").splitlines()
    assert lines[0] == f"file:          x.safetensors, 0 kB, {len(names)} tensors"
    assert lines[1].startswith(f"kind:          {kind}") and "SPO works with" in lines[1]


def test_a_vae_is_named_and_what_holds_no_tensors_refused(tmp_path: Path) -> None:
    assert "kind:          a VAE;" in describe_file(write_vae(tmp_path / "vae.safetensors", tiny_sd15()))
    (tmp_path / "notes.txt").write_text("only some words in a file")
    with pytest.raises(SpoError, match="is a text file"):
        describe_file(tmp_path / "notes.txt")

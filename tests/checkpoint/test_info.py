"""A checkpoint in words."""

from __future__ import annotations

from pathlib import Path

from spo.checkpoint.info import describe
from spo.checkpoint.inspect import inspect_checkpoint
from tests.crafted_files import VAE
from tests.tiny_checkpoints import (
    write_tiny_sd15,
)


def test_missing_vae_and_text_encoders_are_told(tmp_path: Path) -> None:
    path = write_tiny_sd15(tmp_path / "bare.safetensors", leave_out=(VAE, "cond_stage_model."))
    info = inspect_checkpoint(path)
    assert info.vae is None and info.text_encoders == ()
    assert sum("not in the file" in line for line in describe(info)) == 2


def test_describe(sd15: Path, sdxl: Path) -> None:
    lines = describe(inspect_checkpoint(sd15))
    text = "\n".join(lines)
    for words in ("tiny.safetensors", "single file", "F16", "Stable Diffusion 1.5 (sd15)", "epsilon", "32 x 1 (8 head",
                  "clip 32 wide, 3 layers, 1 heads", "scale factor 0.18215"):  # fmt: skip
        assert words in text
    assert all(len(line) < 200 for line in lines)
    assert "open_clip 32 wide" in "\n".join(describe(inspect_checkpoint(sdxl)))

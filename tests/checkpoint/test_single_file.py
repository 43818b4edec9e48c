"""Checkpoints in one file."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

from spo.checkpoint.inspect import inspect_checkpoint
from tests.crafted_files import HERE


def test_tiny_checkpoints(sd15: Path, sdxl: Path) -> None:
    info = inspect_checkpoint(sd15)
    assert (info.unet.channels, info.unet.depths, info.unet.res_blocks) == ((32, 32, 64, 64), (1, 1, 1, 0), 1)
    assert info.parameters == info.unet_parameters + info.vae_parameters + info.text_parameters > 1e6
    assert not info.zero_terminal_snr and info.config_path is None
    info = inspect_checkpoint(str(sdxl))
    assert (info.architecture, info.unet.heads, len(info.text_encoders)) == ("sdxl", (1, 1, 1), 2)


def test_nothing_heavy_is_imported(sd15: Path) -> None:
    code = f"""
    import sys
    from spo.checkpoint.info import describe
    from spo.checkpoint.inspect import inspect_checkpoint
    describe(inspect_checkpoint({str(sd15)!r}))
    assert not {{"torch", "diffusers", "transformers"}} & set(sys.modules)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, cwd=HERE.parent)

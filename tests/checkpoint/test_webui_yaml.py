"""What a yaml beside the checkpoint adds."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from spo.checkpoint.inspect import inspect_checkpoint
from spo.errors import SpoError
from tests.crafted_files import craft, shapes_of


def test_heads_from_yaml(tmp_path: Path, sd15: Path, sdxl: Path) -> None:
    config = tmp_path / "any.yaml"
    config.write_text("model: {params: {unet_config: {params: {num_heads: 4, num_head_channels: -1}}}}")
    assert inspect_checkpoint(sd15, config_path=config).unet.heads == (4, 4, 4, 4)
    assert inspect_checkpoint(sd15, config_path=config).config_path == config
    config.write_text("model: {params: {network_config: {params: {num_head_channels: 16}}}}")
    assert inspect_checkpoint(sdxl, config_path=config).unet.heads == (2, 4, 4)
    config.write_text("model: {params: {unet_config: {params: {num_heads: 5}}}}")
    with pytest.raises(SpoError, match="32 channels in level 0, which do not divide into 5 heads: say num_heads"):
        inspect_checkpoint(sd15, config_path=config)
    with pytest.raises(SpoError, match="there is no configuration file"):
        inspect_checkpoint(sd15, config_path=tmp_path / "none.yaml")
    for text, message in {"a: [": "not a readable yaml", "a: 1": "no model.params",
                          "model: {params: {scale_factor: [1]}}": "value of the wrong kind"}.items():  # fmt: skip
        config.write_text(text)
        with pytest.raises(SpoError, match=message):
            inspect_checkpoint(sd15, config_path=config)


def test_the_bundled_webui_yaml_layout(tmp_path: Path, sd15: Path) -> None:
    """As LDM's own v1-inference.yaml: numbers, a hub name as the encoder's version (ignored), eps by default."""
    text = """
    model:
      target: ldm.models.diffusion.ddpm.LatentDiffusion
      params:
        linear_start: 0.0009
        linear_end: 0.0130
        scale_factor: 0.19
        unet_config:
          target: ldm.modules.diffusionmodules.openaimodel.UNetModel
          params: {num_heads: 8, context_dim: 768}
        cond_stage_config:
          target: ldm.modules.encoders.modules.FrozenCLIPEmbedder
          params: {version: openai/clip-vit-large-patch14}
    """
    path = craft(tmp_path / "x.safetensors", shapes_of(sd15))
    path.with_suffix(".yaml").write_text(textwrap.dedent(text))
    info = inspect_checkpoint(path)
    assert (info.scale_factor, info.schedule.beta_start, info.schedule.beta_end) == (0.19, 0.0009, 0.013)

"""The exported LoRA is the adapter: in a real WebUI, `<lora:NAME:1>` gives the picture of the network in training."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from spo.progress import Watcher
from spo.training.loop import train
from tests.tiny_host import MeanOfChannel
from tests.webui import started
from tests.webui import test_host as host

webui = host.webui
WEBUI = os.environ.get("SPO_WEBUI_DIR")
pytestmark = pytest.mark.skipif(not WEBUI, reason="SPO_WEBUI_DIR does not name a WebUI")
NAME = "spo-test-exported"
DEMO = Path(str(WEBUI)) / "models" / "Stable-diffusion" / "spo-demo.safetensors"
RATE = 0.02 if started.IS_FORK else 0.1
CHECKPOINTS = [
    (started.SD15, "sd15", started.SIZE, RATE),
    (started.SDXL, "sdxl", started.SIZE, RATE),
    pytest.param(
        "spo-demo",
        "sd15",
        64,
        1e-2,
        marks=pytest.mark.skipif(started.IS_FORK or not DEMO.exists(), reason="no demo checkpoint there"),
    ),
]


@pytest.mark.parametrize("save_precision", ["float32", "float16"])
@pytest.mark.parametrize(("name", "architecture", "size", "rate"), CHECKPOINTS)
def test_the_exported_lora_is_the_adapter(
    webui, tmp_path, record_property, name, architecture, size, rate, save_precision
):
    from modules import shared

    from spo.webui.host import borrowed
    from spo.webui.seam import webui as seam

    def picture(prompt):
        return host.txt2img("Euler a", prompt=prompt, size=size)

    host.load(name)
    plain = picture("a fox")
    changes = {"steps": 5, "learning_rate": rate, "width": size, "height": size, "save_precision": save_precision}
    config = host.config_for(tmp_path, name, architecture, output=str(tmp_path / f"{NAME}.safetensors"), **changes)
    in_place = {}

    def saved(path):
        in_place[path] = picture("a fox")

    with borrowed(config) as borrowed_host:
        report = train(borrowed_host, config, ["a fox", "a boat"], MeanOfChannel(), Watcher(saved=saved))
    exported = Path(shared.cmd_opts.lora_dir) / report.output.name
    exported.write_bytes(report.output.read_bytes())
    seam.refresh_loras()
    try:
        found = picture(f"a fox <lora:{NAME}:1>")
    finally:
        exported.unlink()
        seam.refresh_loras()
    expected = in_place[report.output]
    change, difference = int(np.abs(expected - plain).max()), int(np.abs(found - expected).max())
    record_property("change", change)
    record_property("difference", difference)
    print(f"\n{name} {save_precision}: changes up to {change}/255, exported differs by {difference}/255")
    assert change > 20  # the LoRA does something
    assert difference <= 2
    assert np.array_equal(picture("a fox"), plain)

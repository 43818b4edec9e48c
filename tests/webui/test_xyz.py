"""The axes of the X/Y/Z plot: with fakes everywhere, and in a real WebUI where SPO_WEBUI_DIR names one."""

from __future__ import annotations

import inspect
import itertools
import os
import sys
from copy import copy
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from spo.errors import SpoError
from spo.webui import xyz
from tests.webui import started
from tests.webui import test_host as host

webui = host.webui
in_webui = pytest.mark.skipif(not os.environ.get("SPO_WEBUI_DIR"), reason="SPO_WEBUI_DIR does not name a WebUI")
RATE = 0.02 if started.IS_FORK else 0.1
MADE = ["vivid", "vivid-step000100", "vivid-step000050", "Calm"]


class AxisOption:
    def __init__(self, label, type, apply, format_value=None, confirm=None, cost=0.0, choices=None, prepare=None):
        self.label, self.type, self.apply, self.format_value = label, type, apply, format_value
        self.confirm, self.cost, self.choices, self.prepare = confirm, cost, choices, prepare


@pytest.fixture
def plot(monkeypatch):
    """A WebUI's X/Y/Z module and LoRA list, as far as the axes look at them."""
    files = {name: SimpleNamespace(filename=f"{name}.safetensors", metadata={"spo_run_id": "1"}) for name in MADE}
    files["other"] = SimpleNamespace(filename="other.safetensors", metadata={})
    networks, modules, scripts = ModuleType("networks"), ModuleType("modules"), ModuleType("modules.scripts")
    networks.available_networks = files
    module = SimpleNamespace(__name__="xyz_grid.py", AxisOption=AxisOption, axis_options=[])
    other = SimpleNamespace(__name__="outpainting.py")
    scripts.scripts_data = [SimpleNamespace(module=other), SimpleNamespace(module=module)]
    modules.scripts = scripts
    monkeypatch.setitem(sys.modules, "networks", networks)
    monkeypatch.setitem(sys.modules, "modules", modules)
    monkeypatch.setitem(sys.modules, "modules.scripts", scripts)
    xyz.add_axes()
    return module


def axis(plot, label):
    return next(option for option in plot.axis_options if option.label == label)


def test_axes_are_added_once(plot):
    xyz.add_axes()
    labels = ["LoRA", "stage", "weight", "taste", "taste mode", "taste strength", "taste K"]
    assert [option.label for option in plot.axis_options] == [f"[SPO] {label}" for label in labels]
    assert all(type(option) is AxisOption for option in plot.axis_options)  # a subclass breaks the plot's page
    plot.axis_options = []  # as after Reload UI
    xyz.add_axes()
    assert len(plot.axis_options) == len(labels)


def test_choices(plot):
    assert axis(plot, xyz.LORA).choices() == ["None", "Calm", "vivid"]
    assert axis(plot, xyz.STAGE).choices() == ["Calm", "vivid-step000050", "vivid-step000100", "vivid"]


def test_legends_are_short(plot):
    stage, weight = axis(plot, xyz.STAGE), axis(plot, xyz.WEIGHT)
    assert stage.format_value(None, stage, "vivid-step000100") == "vivid step 100"
    assert stage.format_value(None, stage, "vivid") == "vivid"
    assert weight.format_value(None, weight, 0.5) == "weight 0.5"


@pytest.mark.parametrize(
    ("prompt", "chosen", "weight", "expected"),
    [
        ("a fox", "vivid", None, "a fox <lora:vivid:1>"),
        ("a fox", "vivid", 0.5, "a fox <lora:vivid:0.5>"),
        ("", "vivid", 0.5, "<lora:vivid:0.5>"),
        ("a fox <lora:Calm:0.7>", "vivid", None, "a fox <lora:vivid:0.7>"),
        ("a fox <lora:Calm>, red", "vivid", None, "a fox, red <lora:vivid:1>"),
        ("a <lora:Calm:1> fox <lora:vivid:1>", "None", None, "a fox"),
        ("a fox <lora:other:1>", "None", None, "a fox <lora:other:1>"),
        ("a <lora:Calm:1> fox <lora:other:1>", None, 0.3, "a <lora:Calm:0.3> fox <lora:other:1>"),
        ("a <lora:Calm:te=0:unet=1> fox", None, -1.0, "a <lora:Calm:-1> fox"),
        ("a fox", None, 0.3, "a fox"),
    ],
)
def test_the_prompt_is_rewritten(prompt, chosen, weight, expected):
    assert xyz.with_lora(prompt, set(MADE), chosen, weight) == expected


@pytest.mark.parametrize("prompt", ["a fox", ["a fox", "a boat <lora:Calm:0.7>"]])
@pytest.mark.parametrize("file", [(xyz.LORA, "vivid"), (xyz.LORA, "None"), (xyz.STAGE, "vivid-step000050")])
def test_the_order_of_axes_does_not_matter(plot, prompt, file):
    made = []
    for order in itertools.permutations([file, (xyz.WEIGHT, 0.25)]):
        p = SimpleNamespace(prompt=prompt, hr_prompt="hires <lora:Calm:1>")
        cell = copy(p)
        for label, value in order:
            axis(plot, label).apply(cell, value, [value])
        assert p.prompt == prompt and not hasattr(p, "spo_lora") and not hasattr(p, "spo_weight")
        made.append((cell.prompt, cell.hr_prompt))
    assert made[0] == made[1]
    first = made[0][0] if isinstance(prompt, str) else made[0][0][1]
    assert ("0.25" in first) == (file[1] != "None") and "Calm" not in first and "Calm" not in made[0][1]


def test_two_axes_that_choose_the_file_are_refused(plot):
    p = SimpleNamespace(prompt="a fox")
    axis(plot, xyz.LORA).apply(p, "Calm", ["Calm"])
    with pytest.raises(SpoError, match="both choose the file"):
        axis(plot, xyz.STAGE).apply(p, "vivid-step000050", ["vivid-step000050"])


def test_what_cannot_be_plotted_is_said_before(plot):
    p = SimpleNamespace(prompt="a fox", script_args=None, scripts=None)
    with pytest.raises(SpoError, match='"vivit", did you mean "vivid"'):
        axis(plot, xyz.LORA).confirm(p, ["vivit"])
    with pytest.raises(SpoError, match='called "None"'):
        axis(plot, xyz.STAGE).confirm(p, ["None"])
    with pytest.raises(SpoError, match="no value"):
        axis(plot, xyz.STAGE).confirm(p, [])
    weight = axis(plot, xyz.WEIGHT)
    with pytest.raises(SpoError, match="name one in the prompt"):
        weight.confirm(p, [1.0])
    for bad in (float("nan"), 11.0):
        with pytest.raises(SpoError, match="from -10 to 10"):
            weight.confirm(SimpleNamespace(prompt="<lora:vivid:1>"), [bad])
    weight.confirm(SimpleNamespace(prompt="a fox <lora:vivid:1>"), [0.0, 1.0])
    script = SimpleNamespace(current_axis_options=plot.axis_options, args_from=1, args_to=10)
    beside = SimpleNamespace(
        prompt="a fox",
        scripts=SimpleNamespace(selectable_scripts=[script]),
        script_args=(1, 2, "0,1", [], 0, "", ["vivid"], None, "", []),
    )
    weight.confirm(beside, [1.0])
    beside.script_args = (1, 2, "0,1", [], None, "", [], None, "", [])
    with pytest.raises(SpoError, match="name one in the prompt"):
        weight.confirm(beside, [1.0])


# ----------------------------------------------------------------------------------------------- in a real WebUI


@pytest.fixture
def trained(webui, tmp_path):
    """A LoRA with one stage in the WebUI's LoRA folder, gone afterwards."""
    import networks
    from modules import shared

    host.load(started.SD15)
    folder = Path(shared.cmd_opts.lora_dir)
    changes = {"learning_rate": RATE, "save_every": 1, "steps": 2, "output": str(tmp_path / "spo-test-xyz.safetensors")}
    host.train_tiny(tmp_path, started.SD15, "sd15", **changes)
    made = sorted(tmp_path.glob("spo-test-xyz*.safetensors"))
    for path in made:
        (folder / path.name).write_bytes(path.read_bytes())
    networks.list_available_networks()
    yield [path.stem for path in made]
    for path in made:
        (folder / path.name).unlink()
    networks.list_available_networks()


@in_webui
@pytest.mark.parametrize("swapped", [False, True])
def test_in_the_real_plot(trained, monkeypatch, swapped):
    import gradio
    from modules import processing, scripts, shared

    xyz.add_axes()
    xyz.add_axes()
    stage, final = trained
    grid = next(data for data in scripts.scripts_data if "xyz_grid" in data.module.__name__)
    labels = [option.label for option in grid.module.axis_options]
    assert [labels.count(label) for label in (xyz.LORA, xyz.STAGE, xyz.WEIGHT)] == [1, 1, 1]
    assert final in xyz.lora_choices() and stage not in xyz.lora_choices()
    place = xyz.stage_choices().index(stage)
    assert xyz.stage_choices()[place + 1] == final

    script = grid.script_class()
    script.args_from, script.args_to, script.is_txt2img, script.is_img2img = 1, 30, True, False
    with gradio.Blocks():
        script.ui(False)
    runner = scripts.ScriptRunner()
    runner.selectable_scripts = [script]
    places = {option.label: number for number, option in enumerate(script.current_axis_options)}
    loras = (places[xyz.LORA], "", ["None", final])
    weights = (places[xyz.WEIGHT], "0, 1", [])
    axes = (*weights, *loras) if swapped else (*loras, *weights)
    p = processing.StableDiffusionProcessingTxt2Img(
        sd_model=shared.sd_model, prompt="a fox", seed=7, steps=4, cfg_scale=5, width=started.SIZE, height=started.SIZE,
        sampler_name="Euler a", do_not_save_samples=True, do_not_save_grid=True,
    )  # fmt: skip
    flags = {"draw_legend": True, "include_lone_images": True, "items_per_grid": 0, "margin_size": 0}
    names = inspect.signature(script.run).parameters  # p, three of each axis, and others from WebUI to WebUI
    others = [flags.get(name, False) for name in list(names)[10:]]
    p.scripts, p.script_args = runner, (1, *axes, 0, "", [], *others)
    monkeypatch.setitem(shared.opts.data, "grid_save", False)
    try:
        done = runner.run(p, *p.script_args)
    finally:
        p.close()
    cells = [np.asarray(image).astype(int) for image in done.images[-4:]]
    # x goes fastest: (None, 0), (LoRA, 0), (None, 1), (LoRA, 1); swapped: (0, None), (1, None), (0, LoRA), (1, LoRA)
    assert cells[0].std() > 5
    assert np.array_equal(cells[0], cells[1]) and np.array_equal(cells[0], cells[2])
    assert np.abs(cells[3] - cells[0]).max() > 2
    assert [f"<lora:{final}:1>" in text for text in done.infotexts[-4:]] == [False, False, False, True]
    p = SimpleNamespace(prompt="a fox", scripts=None, script_args=None)
    with pytest.raises(SpoError, match="name one in the prompt"):
        script.current_axis_options[places[xyz.WEIGHT]].confirm(p, [1.0])


# ---------------------------------------------------------------------------------------------------------------- taste


def test_axes_of_taste_leave_what_they_chose_to_the_script(plot, monkeypatch):
    monkeypatch.setattr(xyz.taste, "choices_of_models", lambda: ["mine.safetensors", "demo"])
    model, strength = axis(plot, xyz.TASTE["model"]), axis(plot, xyz.TASTE["strength"])
    how, count = axis(plot, xyz.TASTE["how"]), axis(plot, xyz.TASTE["candidates"])
    assert model.choices() == ["None", "mine.safetensors", "demo"] and how.choices() == ["Steer", "Choose"]
    p = SimpleNamespace(prompt="a")
    for option, value in ((strength, 0.5), (model, "mine.safetensors")):
        cell = copy(p)
        option.apply(cell, value, [value])
        p, first = cell, p
        assert getattr(first, "spo_taste", {}) != cell.spo_taste  # the plot's copies share what is not replaced
    assert p.spo_taste == {"strength": 0.5, "model": "mine.safetensors"}
    assert xyz.taste.request_of([False, "", "Steer", 1.0, 4], p.spo_taste).strength == 0.5
    assert (
        model.format_value(p, model, "mine.safetensors") == "mine"
        and model.format_value(p, model, "None") == "no taste"
    )
    assert strength.format_value(p, strength, 0.5) == "taste strength 0.5"
    for option, values in ((model, ["None", "demo"]), (strength, [0.0, -1.0]), (how, ["choose"]), (count, [2, 16])):
        option.confirm(p, values)
    for option, values, says in (
        (model, ["mime.safetensors"], 'did you mean "mine.safetensors"'),
        (strength, [3.0], "accepted are -2 to 2"),
        (how, ["drive"], "accepted are Steer and Choose"),
        (count, [1], "accepted are 2 to 16"),
        (count, [], "has no value"),
    ):
        with pytest.raises(SpoError, match=says):
            option.confirm(p, values)

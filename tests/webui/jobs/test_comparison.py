"""Comparing in the WebUI: the request's checks and the whole job, in a real WebUI where SPO_WEBUI_DIR names one."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from spo.errors import SpoError
from spo.webui.jobs import comparison, job
from spo.webui.jobs.comparison import CompareRequest
from tests.webui import test_host as host

webui = host.webui
in_webui = pytest.mark.skipif(not os.environ.get("SPO_WEBUI_DIR"), reason="SPO_WEBUI_DIR does not name a WebUI")
NAMES = {"tiny-sd1": "spo-test-compare-sd15", "tiny-sdxl": "spo-test-compare-sdxl"}


@pytest.mark.parametrize("weights", [[float("nan")], [float("inf")], [10.5], []])
def test_weights_are_checked(weights):
    with pytest.raises(SpoError, match="weight"):
        comparison._weights(weights)


def test_equal_columns_are_made_once():
    assert comparison._weights([1, 1.0, 0.5]) == [1.0, 0.5]
    assert comparison._seeds([3, 3, 0]) == [3, 0]
    with pytest.raises(SpoError, match="seed -1"):
        comparison._seeds([-1])


def test_rows_have_the_seeds_of_the_list_or_their_own():
    request = CompareRequest(prompts=[], loras=[], seeds=[3, 4])
    assert comparison._rows(["a", "b"], request) == [("a", 3), ("a", 4), ("b", 3), ("b", 4)]
    own = comparison._rows(["a", "b"], CompareRequest(prompts=[], loras=[], seeds_each=2))
    assert own == [("a", 1000), ("a", 1001), ("b", 1002), ("b", 1003)]
    with pytest.raises(SpoError, match="seeds_each is -1"):
        comparison._rows(["a"], CompareRequest(prompts=[], loras=[], seeds_each=-1))


def test_every_judge_is_asked_once():
    request = CompareRequest(prompts=[], loras=[], preference="demo", judges=["demo-judge", "demo", " "])
    assert comparison._names(request) == ["demo", "demo-judge"]


# ----------------------------------------------------------------------------------------------- in a real WebUI


@pytest.fixture(scope="module")
def loras(webui, tmp_path_factory):
    """One LoRA for each architecture in the LoRA folder, with strong weights; gone afterwards."""
    import networks
    from modules import shared

    folder, made = Path(shared.cmd_opts.lora_dir), []
    for name, architecture in host.CHECKPOINTS:
        place = tmp_path_factory.mktemp("lora")
        host.load(name)
        output = str(place / f"{NAMES[name]}.safetensors")
        report = host.train_tiny(place, name, architecture, steps=2, learning_rate=0.1, output=output)
        made.append(folder / report.output.name)
        made[-1].write_bytes(report.output.read_bytes())
    networks.list_available_networks()
    yield folder
    for path in made:
        path.unlink()
    networks.list_available_networks()


@pytest.fixture
def grids(webui, tmp_path, monkeypatch):
    from modules import shared

    monkeypatch.setitem(shared.opts.data, "outdir_txt2img_grids", str(tmp_path / "grids"))
    return tmp_path / "grids"


def request_for(name, **changes):
    values = {"steps": 4, "guidance_scale": 5.0, "width": 128, "height": 128, "seeds": [7]}
    return CompareRequest(**{"prompts": ["a fox"], "loras": [NAMES[name]], **values, **changes})


def finished(started):
    while started.live:
        time.sleep(0.05)
    job._thread.join(60)
    return started


@in_webui
@pytest.mark.parametrize("name", list(NAMES))
def test_a_comparison_from_request_to_grid(loras, grids, name):
    import networks
    from modules import shared
    from PIL import Image

    host.load(name)
    plain = host.txt2img("Euler a", prompt="a boat")
    history = Path(shared.cmd_opts.data_dir) / "params.txt"
    before = history.read_text() if history.exists() else None
    styled = host.txt2img("Euler a", prompt=f"a boat <lora:{NAMES[name]}:0.3>")
    active = [(net.name, net.unet_multiplier) for net in networks.loaded_networks]
    before = history.read_text()
    request = request_for(
        name, prompts=["a fox", "a boat"], seeds=[7, 8], weights=[0.0, 1.0], preference="demo", negative_prompt="bad"
    )
    done = finished(comparison.start_comparison(request))
    assert done.phase == "finished", done.message
    assert done.fraction == 1 and done.step == 12 and done.picture.parent.is_relative_to(grids)
    assert history.read_text() == before
    assert [(net.name, net.unet_multiplier) for net in networks.loaded_networks] == active
    sheet = Image.open(done.picture)
    infotext = sheet.info["parameters"]
    assert infotext.startswith("a fox\nNegative prompt: bad\nSteps: 4, Sampler: Euler a")
    assert f'SPO compared: "base, {NAMES[name]} : 0, {NAMES[name]} : 1"' in infotext
    rows = done.table.splitlines()
    assert len(rows) == 5 and "demo" in rows[0]
    assert rows[3].split()[3:5] == [rows[2].split()[1], "50%"]  # weight 0 is the base
    assert rows[4].split()[3] != rows[2].split()[1]
    assert done.page == done.picture.with_suffix(".html") and done.page.with_suffix(".csv").is_file()
    text = done.page.read_text(encoding="utf-8")
    assert text.count("<article") == 4
    statistics = {name: [mean for mean, _ in cells] for name, cells in done.statistics.rows}
    assert "50%" in " ".join(statistics["Wins against the base (demo)"])
    assert "Drift (pixels, root mean square)" in statistics
    again = finished(comparison.start_comparison(request))
    assert again.picture != done.picture and done.picture.exists()
    assert np.array_equal(np.asarray(Image.open(again.picture)), np.asarray(sheet))
    assert np.array_equal(host.txt2img("Euler a", prompt="a boat"), plain)
    assert np.array_equal(host.txt2img("Euler a", prompt=f"a boat <lora:{NAMES[name]}:0.3>"), styled)


@in_webui
def test_pictures_are_those_of_txt2img(loras, grids):
    host.load("tiny-sd1")
    plan = comparison._prepare(request_for("tiny-sd1", steps=8, negative_prompt="bad", preference="demo"))
    made = [comparison._make_picture(plan, f"a fox {column.tag}".rstrip(), 7) for column in plan.columns]
    for one, column in zip(made, plan.columns, strict=True):
        expected = host.txt2img("Euler a", prompt=f"a fox {column.tag}".rstrip(), scheduler="Automatic")[0]
        assert np.abs(np.asarray(one.images[0]).astype(int) - expected).max() <= 1
    assert not np.array_equal(made[0].images[0], made[1].images[0])


class LooksAtAll:
    """Scores by the pixels, and notes what it was given."""

    name, needs_pixels, needs_denoised = "looks", True, True

    def __init__(self):
        self.seen = []

    def score(self, candidates, prompts):
        self.seen.append((candidates, list(prompts)))
        return candidates.pixels().mean((2, 3, 4))


@in_webui
def test_what_the_preference_model_sees(loras, grids, monkeypatch):
    host.load("tiny-sd1")
    scorer = LooksAtAll()
    monkeypatch.setattr(comparison, "load", lambda *args, **kwargs: scorer)
    request = request_for("tiny-sd1", prompts=["a (fox:1.2) <hypernet:none:1>"], preference="demo")
    assert finished(comparison.start_comparison(request)).phase == "finished"
    assert [prompts for _, prompts in scorer.seen] == [["a (fox:1.2)"]] * 2
    for pool, _ in scorer.seen:
        assert pool.x.shape == (1, 1, 4, 16, 16) and (pool.sigma, pool.timestep) == (0.0, 0.0)
        assert pool.pixels().shape == (1, 1, 3, 128, 128) and pool.pixels().abs().max() <= 1
        from modules import processing

        decoded = processing.decode_latent_batch(host.load("tiny-sd1"), pool.x[0])[0].clamp(-1, 1)
        assert float((decoded.cpu() - pool.pixels()[0, 0].cpu()).abs().max()) <= 1.01 / 127.5


@in_webui
def test_stopped_it_saves_what_is_done(loras, grids, monkeypatch):
    host.load("tiny-sd1")
    make, made = comparison._make_picture, []

    def stop_after_three(*args):
        made.append(make(*args))
        if len(made) == 3:
            job.stop("save")
        return made[-1]

    monkeypatch.setattr(comparison, "_make_picture", stop_after_three)
    request = request_for("tiny-sd1", prompts=["a fox", "a boat"], preference="demo")
    done = finished(comparison.start_comparison(request))
    assert done.phase == "stopped" and "3 of 4" in done.message and done.picture.exists()
    assert len(done.table.splitlines()) == 4
    assert done.page.read_text(encoding="utf-8").count("<article") == 1, "the row that every column has"


@in_webui
def test_the_webuis_own_interrupt_ends_it_and_drops_the_unfinished_picture(loras, grids, monkeypatch):
    from modules import shared

    host.load("tiny-sd1")
    save, kept = comparison._save, []
    monkeypatch.setattr(comparison, "_save", lambda plan, results: kept.append(results) or save(plan, results))
    started = comparison.start_comparison(request_for("tiny-sd1", prompts=["a fox", "a boat"], steps=40))

    def interrupt():
        while started.step < 1 or shared.state.sampling_step < 2:
            time.sleep(0.005)
        shared.state.interrupt()

    thread = threading.Thread(target=interrupt)
    thread.start()
    finished(started)
    thread.join()
    assert started.phase == "stopped" and list(kept[0].pictures) == [(0, 0)]


@in_webui
@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"prompts": ["", " "]}, "no prompts"),
        ({"loras": []}, "No LoRA"),
        ({"loras": ["spo-test-compare-sd16"]}, 'did you mean "spo-test-compare-sd15"'),
        ({"loras": [NAMES["tiny-sdxl"]]}, "LoRA for SDXL"),
        ({"prompts": [f"a fox <lora:{NAMES['tiny-sd1']}:1>"]}, "take it out"),
        ({"weights": [11.0]}, "weight 11"),
        ({"seeds": []}, "no seed"),
        ({"seeds": range(300)}, "600 pictures; a comparison makes at most 400"),
        ({"width": 100}, "width 100"),
        ({"steps": 0}, "steps 0"),
        ({"guidance_scale": float("nan")}, "guidance_scale nan"),
        ({"sampler": "Eular a"}, 'did you mean "Euler a"'),
        ({"preference": "pick.safetensors"}, "no preference model"),
        ({"judges": ["pick.safetensors"]}, "no preference model"),
        ({"judges": ["demo-judge"]}, "knows the demo checkpoint's pictures only"),
        ({"seeds_each": 500}, "seeds_each is 500"),
    ],
)
def test_what_cannot_work_is_said_at_once(loras, changes, told):
    host.load("tiny-sd1")
    former = job.current()
    with pytest.raises(SpoError, match=told):
        comparison.start_comparison(request_for("tiny-sd1", **changes))
    assert job.current() is former


@in_webui
def test_two_files_of_one_name_cannot_be_told_apart(loras):
    host.load("tiny-sd1")
    twin = loras / "spo-test-folder" / f"{NAMES['tiny-sd1']}.safetensors"
    twin.parent.mkdir()
    twin.write_bytes((loras / twin.name).read_bytes())
    try:
        with pytest.raises(SpoError, match="cannot tell .* and .* apart"):
            comparison.start_comparison(request_for("tiny-sd1"))
    finally:
        twin.unlink()
        twin.parent.rmdir()


@in_webui
def test_another_checkpoint_by_the_time_its_turn_comes(loras):
    from modules import call_queue

    host.load("tiny-sd1")
    with call_queue.queue_lock:
        started = comparison.start_comparison(request_for("tiny-sd1"))
        host.load("tiny-sdxl")
    assert finished(started).phase == "failed" and "start it again" in started.message

"""The script "SPO taste": what its fields mean, what it refuses; and in a real WebUI, where SPO_WEBUI_DIR names one,
that it works with its samplers, leaves nothing behind, and changes nothing when it is off."""

from __future__ import annotations

import json
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from spo.algorithm.diffusion import scaled_linear_alphas_cumprod
from spo.errors import SpoError
from spo.preference.steer import MAX_STRENGTH
from spo.preference.taste.head import PromptReader, TasteFacts, TasteHead, TasteNetwork, save_taste
from spo.webui import folders, seam, taste
from spo.webui.a1111 import SamplerPass, loop
from spo.webui.a1111.prompts import text_features
from spo.webui.taste import CHOOSE, STEER, TasteRequest, change_of, request_of
from tests.webui import started
from tests.webui import test_host as host

webui = host.webui
in_webui = pytest.mark.skipif(not os.environ.get("SPO_WEBUI_DIR"), reason="SPO_WEBUI_DIR does not name a WebUI")
FIELDS = ["enabled", "model", "how", "strength", "candidates"]


def random_head(**facts):
    """It likes the same at every noise level."""
    torch.manual_seed(3)
    members = [TasteNetwork(8), TasteNetwork(8)]
    with torch.no_grad():
        for member in members:
            for layer in (member.level[2], member.told):
                layer.weight.zero_()
                layer.bias.zero_()
    return TasteHead(members, TasteFacts(name="mine", **{"checkpoint_name": "tiny-sd1", **facts}))


# --------------------------------------------------------------------------------------------------- what is asked for


def test_the_fields_are_a_request():
    assert request_of([True, "a.safetensors", "Choose", 0.5, 8], {}) == TasteRequest(
        True, "a.safetensors", CHOOSE, 0.5, 8
    )
    assert not request_of([False, "a.safetensors", "Steer", 9.0, 8], {}).enabled
    assert not request_of([], {}).enabled and not request_of([None] * 5, {}).enabled


def test_the_api_may_give_one_object():
    assert request_of([{"model": "a", "how": "choose"}], {}) == TasteRequest(True, "a", CHOOSE, 1.0, 4)
    assert not request_of([{"enabled": False, "model": "a"}], {}).enabled
    with pytest.raises(SpoError, match='SPO taste has no "strenght", did you mean "strength"'):
        request_of([{"model": "a", "strenght": 1}], {})


def test_axes_win_and_switch_it_on():
    fields = [False, "a", "Steer", 1.0, 4]
    assert request_of(fields, {"strength": 0.25}) == TasteRequest(True, "a", STEER, 0.25, 4)
    assert request_of(fields, {"model": "b"}).model == "b"
    assert not request_of([True, *fields[1:]], {"model": "None", "strength": 1.0}).enabled


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("how", "drive", 'how is "drive"; accepted are Steer and Choose'),
        ("strength", 2.5, "strength is 2.5; accepted are -2 to 2"),
        ("strength", float("nan"), "strength is nan; accepted"),
        ("strength", None, "strength is None; accepted"),
        ("candidates", 1, "candidates is 1; accepted are 2 to 16"),
        ("candidates", 2.5, "candidates is 2.5; accepted"),
        ("candidates", "many", "candidates is 'many'; accepted"),
    ],
)
def test_values_that_cannot_be_used_are_named(name, value, says):
    with pytest.raises(SpoError, match=says):
        request_of([{"model": "a", name: value}], {})


# -------------------------------------------------------------------------------------------------- what comes of that


def sampler_pass(**changes):
    usual = {
        "architecture": "sd15", "checkpoint_name": "tiny-sd1", "checkpoint_hash": "", "sampler": "Euler a",
        "ancestral": True, "prompts": ["a"], "seeds": [1], "text": lambda: torch.ones(1, 6), "eta": 1.0, "settings": {},
    }  # fmt: skip
    return SamplerPass(**{**usual, **changes})


@pytest.fixture
def models(monkeypatch, tmp_path):
    """models/SPO with two heads; the WebUI computes on the CPU."""
    monkeypatch.setattr(folders, "preference_folder", lambda: tmp_path)
    monkeypatch.setattr(seam.webui, "device", lambda: torch.device("cpu"))
    monkeypatch.setattr(taste, "_loaded", {})
    save_taste(random_head(), tmp_path / "mine.safetensors")
    save_taste(random_head(architecture="sdxl"), tmp_path / "large.safetensors")
    return tmp_path


def test_nothing_comes_of_it_when_it_is_off_and_the_model_is_given_back(models):
    assert change_of(sampler_pass(), [False, "mine.safetensors", STEER, 1.0, 4]) is None
    change_of(sampler_pass(), [True, "mine.safetensors", STEER, 1.0, 4])
    assert taste._loaded
    assert change_of(sampler_pass(), [False]) is None and not taste._loaded


def test_steering_shifts_and_says_so(models):
    change = change_of(sampler_pass(sampler="UniPC", ancestral=False), [True, "mine.safetensors", STEER, 0.5, 4])
    assert change.function is None and change.remark == ""
    assert change.shift(torch.randn(1, 4, 8, 8), torch.ones(1)).shape == (1, 4, 8, 8)
    assert change.infotext == {
        "SPO taste": "mine.safetensors", "SPO taste mode": "Steer", "SPO taste strength": "0.5",
    }  # fmt: skip
    assert change_of(sampler_pass(), [True, "mine.safetensors", STEER, 0.0, 4]).shift is None


def test_choosing_needs_euler_a_with_noise(models):
    values = [True, "mine.safetensors", CHOOSE, 1.0, 8]
    change = change_of(sampler_pass(), values)
    assert change.shift is None and change.function is not None
    assert change.infotext["SPO taste K"] == "8"
    with pytest.raises(SpoError, match="DPM\\+\\+ 2M SDE has no independent noise in each step"):
        change_of(sampler_pass(sampler="DPM++ 2M SDE", ancestral=False), values)
    with pytest.raises(SpoError, match="the setting Eta is 0"):
        change_of(sampler_pass(eta=0.0), values)


@pytest.mark.parametrize(
    ("changes", "model", "how", "says"),
    [
        ({}, "", STEER, "on without a model"),
        ({}, "other.safetensors", STEER, 'There is no preference model "other.safetensors"'),
        ({}, "../mine.safetensors", STEER, "There is no preference model"),
        ({}, "large.safetensors", STEER, '"large.safetensors" was made for sdxl, and tiny-sd1 is sd15'),
        ({"architecture": "sdxl"}, "mine.safetensors", CHOOSE, "was made for sd15"),
        ({"architecture": ""}, "mine.safetensors", STEER, "works with SD1.5 and SDXL"),
        ({}, "demo", CHOOSE, "knows the demo checkpoint's pictures only"),
        ({"checkpoint_name": "spo-demo"}, "demo", STEER, '"demo" cannot steer'),
    ],
)
def test_a_model_that_does_not_fit_is_refused(models, changes, model, how, says):
    with pytest.raises(SpoError, match=says):
        change_of(sampler_pass(**changes), [True, model, how, 1.0, 4])


def test_a_head_of_another_checkpoint_gets_a_remark(models):
    values = [True, "mine.safetensors", STEER, 1.0, 4]
    assert (
        "fitted to pictures of tiny-sd1, not of other"
        in change_of(sampler_pass(checkpoint_name="other"), values).remark
    )
    save_taste(random_head(checkpoint_hash="0123456789"), models / "mine.safetensors")
    os.utime(models / "mine.safetensors", (1, 1))  # as if written later than the loaded one
    renamed = sampler_pass(checkpoint_name="other", checkpoint_hash="0123456789")
    assert change_of(renamed, values).remark == ""


def test_heads_come_first_among_the_models(models):
    os.utime(models / "large.safetensors", (1, 1))
    assert taste.choices_of_models() == ["mine.safetensors", "large.safetensors", "demo"]


def test_fields_come_in_the_requests_order_and_find_themselves_in_an_infotext(models, monkeypatch):
    pytest.importorskip("gradio")
    import gradio as gr

    monkeypatch.setattr(seam.webui, "refresh_button", lambda *given: None)
    with gr.Blocks():
        fields, pasted = taste.build(False)
    assert [field.elem_id for field in fields] == [f"spo_taste_txt2img_{name}" for name in FIELDS]
    assert [field for field, _ in pasted] == fields
    change = change_of(sampler_pass(), [True, "mine.safetensors", CHOOSE, 1.0, 8])
    assert pasted[0][1](change.infotext) is True and pasted[0][1]({}) is False
    assert {key for _, key in pasted[1:]} >= set(change.infotext)


# ----------------------------------------------------------------------------------------- the network's outputs, moved


def call_of(latents, levels, rows, *, alphas=None, wide=False):
    """The CFG denoiser's arguments: rows of prompts for images, then one of the negative prompt for each image."""
    every = [*rows, *range(len(latents))]
    uncond = torch.zeros(len(latents), 77, 8)
    return SimpleNamespace(
        x=latents[every], sigma=levels[every], text_uncond={"crossattn": uncond} if wide else uncond,
        denoiser=SimpleNamespace() if alphas is None else SimpleNamespace(alphas=alphas),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("wide", [False, True], ids=["sd15", "sdxl"])
def test_every_row_moves_as_its_image_does(dtype, wide):
    """Two prompts joined by AND for the first image, one for the second, in the precision of the outputs."""
    latents, shift = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    outputs = torch.zeros(5, 4, 8, 8, dtype=dtype)
    seen, call = [], call_of(latents, torch.tensor([3.0, 3.0]), [0, 0, 1], wide=wide)
    loop._add_shift(call, outputs, lambda x, sigma: (seen.append(sigma), shift)[1])
    assert torch.equal(outputs, shift[[0, 0, 1, 0, 1]].to(dtype)) and outputs.dtype == dtype
    assert seen[0].tolist() == [3.0, 3.0]


def test_outputs_that_are_noise_move_against_it_in_their_own_form():
    """x_vp = sqrt(a) x_0 + sqrt(1 - a) e: what a move of x_0 by d does to e, and the latents that the head gets."""
    alphas = scaled_linear_alphas_cumprod()
    a = alphas[[801, 101]][:, None, None, None]
    clean, noise, shift = (torch.randn(2, 4, 8, 8) for _ in range(3))
    seen, outputs = [], torch.cat([noise, noise])
    call = call_of(a.sqrt() * clean + (1 - a).sqrt() * noise, torch.tensor([801.0, 101.0]), [0, 1], alphas=alphas)
    loop._add_shift(call, outputs, lambda x, s: (seen.append((x, s)), shift)[1])
    predicted = (call.x - torch.cat([(1 - a).sqrt()] * 2) * outputs) / torch.cat([a.sqrt()] * 2)
    torch.testing.assert_close(predicted, torch.cat([clean + shift] * 2), rtol=1e-4, atol=1e-4)
    (x, sigma), levels = seen[0], ((1 - a) / a).sqrt()
    torch.testing.assert_close(sigma, levels.flatten())
    torch.testing.assert_close(x, clean + levels * noise, rtol=1e-4, atol=1e-4)


def test_timesteps_between_whole_ones_have_levels_between():
    alphas = scaled_linear_alphas_cumprod()
    low, middle, high = loop._sigma_of_timestep(torch.tensor([500.0, 500.5, 501.0]), alphas).tolist()
    assert low < middle < high
    ends = loop._sigma_of_timestep(torch.tensor([-1.0, 1000.0]), alphas.half()).tolist()  # beyond both; a half schedule
    assert ends[0] == pytest.approx(0.029, abs=3e-3) and ends[1] == pytest.approx(14.6, rel=2e-2)


# ------------------------------------------------------------------------------------------------------ in a real WebUI

STEERED = [
    "Euler", "Euler a", "DPM++ 2M", "DPM++ SDE", "DPM++ 2M SDE", "DPM++ 3M SDE", "DPM++ 2S a", "Heun", "LMS", "DPM2 a",
    "DPM adaptive", "Restart", "LCM", "DDIM", "DDIM CFG++", "PLMS", "UniPC",
]  # fmt: skip
if started.IS_FORK:
    STEERED = ["Euler a", "DPM++ 2M", "DDIM"]  # forks are slow on a CPU
HEAD = "spo-test-taste.safetensors"


@pytest.fixture
def head(webui):
    """A head in the WebUI's models/SPO, with an SD1.5 checkpoint loaded."""
    place = folders.preference_folder()
    place.mkdir(exist_ok=True)
    save_taste(random_head(), place / HEAD)
    host.load(started.SD15)
    yield random_head()
    (place / HEAD).unlink()


def generate(values, sampler="Euler a", *, with_script=True, img2img=None, pictures=2, steps=6, during=None, **changes):
    """(pictures, latents, infotext) of the WebUI's own processing with our script among its scripts, or without any."""
    import gradio as gr
    from modules import processing, scripts, shared

    kind = processing.StableDiffusionProcessingTxt2Img
    if img2img is not None:
        kind, changes = processing.StableDiffusionProcessingImg2Img, {"init_images": [img2img], **changes}
    usual = {
        "prompt": host.PROMPT, "negative_prompt": "bad", "seed": 7, "steps": steps, "cfg_scale": 5, "width": 64,
        "height": 64, "sampler_name": sampler, "batch_size": pictures, "do_not_save_samples": True,
        "do_not_save_grid": True,
    }  # fmt: skip
    p = kind(sd_model=shared.sd_model, **{**usual, **changes})
    p.scheduler = "Automatic"  # Forge classic has no such field
    started.without_scripts(p)
    if with_script:
        runner = scripts.ScriptRunner()
        runner.initialize_scripts(img2img is not None)
        (ours,) = [script for script in runner.scripts if script.title() == taste.TITLE]
        runner.scripts, runner.alwayson_scripts, runner.selectable_scripts = [ours], [ours], []
        with gr.Blocks():
            runner.prepare_ui()
            runner.create_script_ui(ours)
        p.scripts, p.script_args = runner, [0, *values]
    sample, latents = p.sample, []

    def seen(*args, **given):
        if during is not None:
            during(p)
        latents.append(sample(*args, **given))
        return latents[-1]

    p.sample = seen
    before = hooks()
    torch.manual_seed(0)  # img2img draws from what its VAE encodes
    try:
        processed = processing.process_images(p)
        return np.stack([np.asarray(image) for image in processed.images[-pictures:]]), latents[-1], processed.info
    finally:
        p.close()
        assert hooks() == before


def hooks():
    """How many callbacks of ours the sampler's loop has; in forks twice whether a function is ours, for want of any."""
    from modules import script_callbacks, sd_samplers_cfg_denoiser

    if started.IS_FORK:
        place = sd_samplers_cfg_denoiser
        if not hasattr(place, "sampling_function"):  # in Forge classic
            from modules_forge import forge_sampler as place
        return (int(place.sampling_function.__module__.startswith("spo.")),) * 2

    def count(category):
        return sum("spo" in (one.name or "") for one in script_callbacks.ordered_callbacks(category))

    return count("cfg_denoiser"), count("cfg_denoised")


def on(strength=1.0, how=STEER, candidates=4, model=HEAD):
    return [True, model, how, strength, candidates]


OFF = [False, HEAD, STEER, 1.0, 4]


@in_webui
@pytest.mark.parametrize("sampler", STEERED)
def test_steering_raises_the_score_with_every_sampler_and_off_is_as_without(head, sampler):
    plain, _, infotext = generate([], sampler, with_script=False)
    off, _, same = generate(OFF, sampler)
    assert np.array_equal(plain, off) and infotext == same and "SPO" not in infotext
    scores = {}
    for strength in (-2.0, 0.0, 2.0):
        pictures, latents, infotext = generate(on(strength), sampler)
        scores[strength] = head.member_scores(latents.float(), 0.03).mean(0)
        assert f"SPO taste: {HEAD}, SPO taste mode: Steer, SPO taste strength: {strength:g}" in infotext
        assert np.array_equal(pictures, plain) == (strength == 0)
    assert bool((scores[-2.0] < scores[0.0]).all() and (scores[0.0] < scores[2.0]).all()), scores
    assert np.array_equal(generate(OFF, sampler)[0], plain)


@in_webui
@pytest.mark.parametrize("sampler", ["Euler", "DDIM", "UniPC"])
def test_the_guided_prediction_moves_by_the_shift_with_and_and_at_any_scale(head, sampler):
    """At the first step, where both start from the same latents; the noise of DDIM's kind moves against it, which
    forks make of the prediction after this."""
    from modules import script_callbacks

    shift, levels, outputs = torch.randn(2, 4, 8, 8), [], []

    def known(latents, sigma):
        levels.append((latents.clone(), sigma.clone()))
        return shift

    def keep(parameters):
        outputs.append(parameters.x.clone())

    for bent in (False, True):
        first = len(outputs)
        script_callbacks.on_cfg_after_cfg(keep)
        try:
            if bent:
                with seam.webui.predictions_shifted(known):
                    generate([], sampler, with_script=False, steps=3)
            else:
                generate([], sampler, with_script=False, steps=3)
        finally:
            script_callbacks.remove_callbacks_for_function(keep)
        del outputs[first + 1 :]
    latents, sigma = levels[0]
    moved = outputs[1] - outputs[0]
    expected = shift if sampler == "Euler" or started.IS_FORK else -shift / sigma[:, None, None, None]
    torch.testing.assert_close(moved, expected, rtol=1e-4, atol=1e-4)
    assert latents.shape == (2, 4, 8, 8) and 10 < float(sigma[0]) < 15
    assert abs(float(latents.std()) / float(sigma[0]) - 1) < 0.2  # in the form of x_0 + sigma * noise


@in_webui
def test_choosing_raises_the_score_and_one_candidate_would_be_the_ordinary_picture(head, monkeypatch):
    plain, latents, _ = generate(OFF)
    _, chosen, infotext = generate(on(how=CHOOSE, candidates=12))
    before, after = (head.member_scores(one.float(), 0.03).mean() for one in (latents, chosen))
    assert before < after and "SPO taste mode: Choose, SPO taste K: 12" in infotext
    monkeypatch.setattr(TasteHead, "score", lambda self, candidates, prompts: torch.zeros(candidates.x.shape[:2]))
    same, _, _ = generate(on(how=CHOOSE))
    assert np.abs(same.astype(int) - plain.astype(int)).max() <= 1


@in_webui
def test_pictures_of_a_batch_are_those_made_alone(head):
    for values in (on(), on(how=CHOOSE)):
        together, _, _ = generate(values, prompt="a fox")
        alone, _, _ = generate(values, prompt="a fox", pictures=1, seed=8)
        assert np.abs(together[1].astype(int) - alone[0].astype(int)).max() <= 1


@in_webui
@pytest.mark.parametrize("values", [on(), on(how=CHOOSE)], ids=["steer", "choose"])
def test_hires_fix_img2img_and_inpainting(head, values):
    hires = {"enable_hr": True, "hr_scale": 2, "hr_upscaler": "Latent", "denoising_strength": 0.7}
    plain, _, _ = generate(OFF, **hires)
    bent, _, infotext = generate(values, **hires)
    assert bent.shape == (2, 128, 128, 3) and not np.array_equal(plain, bent) and "SPO taste" in infotext

    from PIL import Image

    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    plain, _, _ = generate(OFF, img2img=picture)
    bent, _, _ = generate(values, img2img=picture, n_iter=2)
    assert not np.array_equal(plain, bent)

    mask = Image.new("L", (64, 64), 0)
    mask.paste(255, (32, 0, 64, 64))
    for sampler in ["Euler a"] if values[2] == CHOOSE else ["Euler a", "DDIM"]:
        masked = {"img2img": picture, "mask": mask, "mask_blur": 0, "inpaint_full_res": False, "inpainting_fill": 1}
        plain, before, _ = generate(OFF, sampler, **masked)
        bent, after, _ = generate(values, sampler, **masked)
        assert torch.equal(before[..., :4], after[..., :4]) and not torch.equal(before[..., 4:], after[..., 4:])


@in_webui
def test_what_fails_ends_the_generation_and_leaves_nothing(head, monkeypatch):
    plain, _, _ = generate(OFF)
    with pytest.raises(SpoError, match='There is no preference model "none"'):
        generate(on(model="none"))
    with pytest.raises(SpoError, match="DDIM has no independent noise"):
        generate(on(how=CHOOSE), "DDIM")

    def breaks(self, x, sigma):
        raise ValueError("in the middle")

    with monkeypatch.context() as patch:
        patch.setattr("spo.preference.steer.Steering.shift", breaks)
        with pytest.raises(ValueError, match="in the middle"):
            generate(on())
    assert hooks() == (0, 0)
    assert np.array_equal(generate(OFF)[0], plain)
    host.load(started.SDXL)
    with pytest.raises(SpoError, match=f"was made for sd15, and {started.SDXL} is sdxl"):
        generate(on())


@in_webui
def test_interrupting_leaves_nothing(head):
    from modules import script_callbacks, shared

    calls = []

    def interrupt(parameters):
        calls.append(hooks())
        if len(calls) == 3:
            shared.state.interrupted = True

    plain, _, _ = generate(OFF)
    for values in (on(), on(how=CHOOSE)):
        calls.clear()
        script_callbacks.on_cfg_after_cfg(interrupt)
        try:
            generate(values)
        finally:
            script_callbacks.remove_callbacks_for_function(interrupt)
            shared.state.interrupted = False
        assert calls == [(1, 1) if values[2] == STEER else (0, 0)] * 3
    assert np.array_equal(generate(OFF)[0], plain)


@in_webui
def test_sdxl_is_steered(head):
    place = folders.preference_folder()
    save_taste(random_head(architecture="sdxl", checkpoint_name="tiny-sdxl"), place / HEAD)
    os.utime(place / HEAD, (1, 1))
    host.load(started.SDXL)
    scores = [
        head.member_scores(generate(on(strength), sampler)[1].float(), 0.03).mean(0)
        for sampler in ("DPM++ 2M", "DDIM")
        for strength in (-MAX_STRENGTH, MAX_STRENGTH)
    ]
    assert bool((scores[0] < scores[1]).all() and (scores[2] < scores[3]).all())


@in_webui
def test_the_infotext_fills_the_fields_again(head):
    from modules import infotext_utils

    _, _, info = generate(on(0.75))
    parsed = infotext_utils.parse_generation_parameters(info)
    assert parsed["SPO taste"] == HEAD and parsed["SPO taste strength"] == "0.75" and parsed["SPO taste mode"] == STEER
    assert "SPO" not in json.dumps(infotext_utils.parse_generation_parameters(generate(OFF)[2]))


# -------------------------------------------------------------------------------------------------- the prompt's text


def test_the_text_of_a_pass_is_the_mean_of_the_first_chunk_by_the_weights_of_the_parts():
    def part(value, weight, wrapped=False):
        tokens = torch.cat([torch.full((77, 6), value), torch.full((77, 6), 100.0)])
        first, last = ({"crossattn": one} if wrapped else one for one in (torch.zeros(77, 6), tokens))
        return SimpleNamespace(schedules=[SimpleNamespace(cond=first), SimpleNamespace(cond=last)], weight=weight)

    prompts = [[part(1.0, 1.0)], [part(1.0, 1.0, True), part(4.0, 2.0, True), part(9.0, -1.0, True)]]
    text = text_features(SimpleNamespace(batch=prompts))
    torch.testing.assert_close(text, torch.tensor([[1.0] * 6, [3.0] * 6]))


def test_a_head_that_reads_the_prompt_gets_it_and_refuses_another_width(models):
    torch.manual_seed(0)
    head = TasteHead([TasteNetwork(8, codes=2)], TasteFacts(), PromptReader(torch.zeros(6), torch.randn(2, 6)))
    save_taste(head, models / "reads.safetensors")
    for how in (STEER, CHOOSE):
        values = [True, "reads.safetensors", how, 1.0, 4]
        assert change_of(sampler_pass(), values) is not None
        with pytest.raises(SpoError, match="reads text features of width 6, and the checkpoint's have 8"):
            change_of(sampler_pass(text=lambda: torch.ones(1, 8)), values)

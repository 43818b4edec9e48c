"""Training the step-aware CLIP: loss against the recording, predictions, accuracy, resume."""

from __future__ import annotations

import csv
import json
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from spo.algorithm.denoiser import GuidedDenoiser
from spo.algorithm.diffusion import training_sigmas
from spo.algorithm.preference import Candidates
from spo.config import build_config
from spo.errors import SpoError
from spo.headless.host import load_host
from spo.preference.clip.accuracy import accuracy_table
from spo.preference.clip.pair_data import open_pairs
from spo.preference.clip.towers import prepare_pictures, token_ids
from spo.preference.load import load
from spo.progress import Watcher
from spo.rng import generator
from spo.training.clip import (
    ClipTraining,
    accuracy_by_timestep,
    labels_by,
    predicted_pictures,
    rate_at,
    starting_model,
    train_clip,
)
from tests.conftest import relative_error
from tests.preference.clip.test_pair_data import write_folder
from tests.preference.clip.test_scores import save_folder, transformers_clip
from tests.threads import together
from tests.tiny_checkpoints import write_tiny_sd15


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("training")
    save_folder(transformers_clip(), folder / "PickScore_v1")
    write_tiny_sd15(folder / "tiny.safetensors", res_blocks=2)
    write_folder(folder / "pairs", 16)
    return folder


@pytest.fixture(scope="module")
def host(place):
    checkpoint = {"checkpoint": str(place / "tiny.safetensors"), "device": "cpu", "width": 64, "height": 64}
    return load_host(build_config({**checkpoint, "guidance_scale": 5.0}))


def settings_for(folder, **changes):
    values = {
        "width": 64, "height": 64, "steps": 4, "pairs_per_call": 2, "accumulation": 2, "warmup_steps": 2,
        "learning_rate": 1e-3, "held_out_one_in": 4, "measure_every": 2, "save_every": 1,
    }  # fmt: skip
    return ClipTraining(output=folder / "spm.safetensors", **{**values, **changes})


# ---- predictions


def test_both_pictures_of_a_pair_get_the_same_noise(host):
    torch.manual_seed(0)
    one = torch.rand(1, 1, 3, 64, 64) * 2 - 1
    seen = []

    class Spy:
        device, alphas_cumprod, decode, prepare = host.device, host.alphas_cumprod, host.decode, host.prepare

        def encode(self, pictures, noise):
            return host.encode(pictures)  # without the VAE's own noise, equal pictures have equal latents

        def denoise(self, x, sigma, prompts, step):
            seen.append((x, sigma, prompts))
            return host.denoise(x, sigma, prompts, step)

    pictures = one.expand(2, 2, 3, 64, 64)
    predicted = predicted_pictures(Spy(), pictures, ["a fox", "a boat"], torch.tensor([700, 700]), (0, "here"))
    assert predicted.shape == (2, 2, 3, 64, 64) and predicted.dtype == torch.float32
    x, sigma, prompts = seen[0]
    assert prompts == ["a fox", "a fox", "a boat", "a boat"]
    assert torch.equal(x[0], x[1]) and torch.equal(x[2], x[3]) and not torch.allclose(x[0], x[2])
    assert torch.allclose(sigma, training_sigmas(host.alphas_cumprod)[700].float())
    noise = torch.randn(4, *x.shape[2:], generator=generator(0, "here", "noise", 0))
    assert torch.allclose(x[0] - host.encode(one[:, 0])[0], sigma[0] * noise, atol=1e-4)


def test_the_prediction_is_guided(host):
    pictures = torch.rand(1, 2, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    host.prepare(["a fox"])
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    denoiser = host.denoiser
    assert isinstance(denoiser, GuidedDenoiser)
    sigma = torch.tensor([3.0])
    guided = host.denoise(x, sigma, ["a fox"], torch.zeros(1, dtype=torch.long))
    arguments = host.arguments(["a fox"])
    bare, without = denoiser(x, sigma, arguments["cond"]), denoiser(x, sigma, arguments["uncond"])
    assert torch.allclose(guided, without + 5 * (bare - without), atol=1e-3)
    assert predicted_pictures(host, pictures, ["a fox"], torch.tensor([0]), (1,)).isfinite().all()


def test_learning_rate():
    settings = ClipTraining(output=Path("spm.safetensors"), steps=100, warmup_steps=10, learning_rate=1.0)
    assert [rate_at(settings, step) for step in (0, 4, 9, 10, 55, 100)] == [0.1, 0.5, 1.0, 1.0, 0.5, 0.0]


# ---- start


def test_from_pickscore_the_start_is_pickscore(place):
    start, again = starting_model(place / "PickScore_v1"), starting_model(place / "PickScore_v1")
    assert all(torch.equal(a, b) for a, b in zip(start.parameters(), again.parameters(), strict=True))
    clip = transformers_clip()
    pixels = torch.rand(2, 3, 28, 28) * 2 - 1
    with torch.no_grad():
        answer = clip(input_ids=token_ids(["a"]), pixel_values=prepare_pictures(pixels, 28))
        for t in (0, 700):
            assert relative_error(start.image_features(pixels, torch.tensor([t, t])), answer.image_embeds) < 1e-5


def test_other_files_cannot_be_started_from(place):
    with pytest.raises(SpoError, match='"tiny.safetensors" is neither a CLIP, as PickScore, nor a step-aware one'):
        starting_model(place / "tiny.safetensors")


# ---- training


def run(place, host, folder, watcher=None, resume=False, **changes):
    model = starting_model(place / "PickScore_v1")
    source = open_pairs(place / "pairs")
    return train_clip(model, host, source, settings_for(folder, **changes), watcher or Watcher(), resume=resume)


@pytest.mark.slow
def test_a_run_that_was_stopped_ends_the_same_bit_for_bit(place, host, tmp_path):
    (tmp_path / "whole").mkdir(), (tmp_path / "parts").mkdir()
    whole = run(place, host, tmp_path / "whole")
    asked = iter([False, False, False, True])
    stopped = run(place, host, tmp_path / "parts", Watcher(should_stop=lambda: next(asked)))
    assert not stopped.finished and stopped.steps == 3 and stopped.output is None
    finished = run(place, host, tmp_path / "parts", resume=True)
    assert finished.finished and finished.accuracy == whole.accuracy
    for name in ("spm.spo/metrics.csv", "spm.spo/accuracy.csv"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes(), name
    one, two = load_file(whole.output), load_file(finished.output)
    assert one.keys() == two.keys() and all(torch.equal(value, two[name]) for name, value in one.items())
    assert metadata_of(whole.output) == metadata_of(finished.output)

    with (tmp_path / "whole/spm.spo/accuracy.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["batch"] for row in rows] == ["0", "2", "4"] and list(rows[0])[2:] == ["0", "251", "501", "701", "951"]
    assert "t = 951" in accuracy_table(tmp_path / "whole/spm.spo/accuracy.csv")

    start, trained = starting_model(place / "PickScore_v1"), load(whole.output)  # in the published layout
    moved = [n for n, v in trained.named_parameters() if not torch.equal(v, start.state_dict()[n])]
    still = {n for n, _ in trained.named_parameters()} - set(moved)
    assert not [name for name in still if not name.endswith("k_proj.bias")], still
    with pytest.raises(SpoError, match="exists already"):
        run(place, host, tmp_path / "whole")
    with pytest.raises(SpoError, match="The run to resume has learning_rate 0.001, not 0.1"):
        run(place, host, tmp_path / "parts", resume=True, learning_rate=0.1)


def test_frozen_text_stays(place, host, tmp_path):
    report = run(place, host, tmp_path, train_text=False, steps=1, measure_every=0)
    start, trained = starting_model(place / "PickScore_v1").state_dict(), load(report.output).state_dict()
    same = {name for name, value in trained.items() if torch.equal(value, start[name])}
    assert all((name in same) for name in trained if name.startswith("text_"))
    assert not all(name in same for name in trained if name.startswith("vision_"))


def test_it_learns_what_was_labelled(place, host, tmp_path):
    """Redder wins. On the pictures themselves, as the tiny diffusion model's predictions carry nothing."""

    class Clear:
        """A host whose prediction is the picture."""

        architecture, checkpoint_name, decode_batch = "sd15", "none", 4
        device, alphas_cumprod = host.device, host.alphas_cumprod

        def prepare(self, prompts):
            pass

        def encode(self, pictures, noise):
            self.pictures = pictures
            return noise

        def denoise(self, x, sigma, prompts, step):
            return x

        def decode(self, latents):
            return self.pictures

    report = run(place, Clear(), tmp_path, steps=30, warmup_steps=1, measure_every=0, learning_rate=2e-3)
    with (report.files.metrics).open() as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file)]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    assert [entry.share for entry in report.accuracy] == [1.0] * 5
    assert report.accuracy[0].timestep == 0 and report.accuracy[0].pairs > 1


def test_accuracy_leaves_ties_out(place, host, tmp_path):
    model = starting_model(place / "PickScore_v1")
    pairs = list(open_pairs(place / "pairs").pairs(0, -1))
    found = accuracy_by_timestep(model, host, pairs, settings_for(tmp_path), timesteps=(0,))
    assert [(entry.timestep, entry.pairs) for entry in found] == [(0, 15)]


def test_labels_by_another_model():
    class Brightness:
        needs_pixels, needs_denoised, name = True, True, "brightness"

        def score(self, candidates: Candidates, prompts):
            return candidates.pixels().mean((2, 3, 4))

    shades = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.5, 0.51]])
    pictures = shades[:, :, None, None, None].expand(3, 2, 3, 16, 16)
    assert labels_by(Brightness(), pictures, ["", "", ""], 0.1).tolist() == [1.0, 0.0, 0.5]


def test_broken_pairs_are_told(place, host, tmp_path):
    folder = write_folder(tmp_path / "pairs", 8)
    (folder / "001_win.png").write_text("broken")
    said = []
    model, source = starting_model(place / "PickScore_v1"), open_pairs(folder)
    settings = settings_for(tmp_path, steps=2, held_out_one_in=0)
    report = train_clip(model, host, source, settings, Watcher(log=said.append))
    assert report.finished and report.accuracy == () and report.skipped == 1
    assert said == ["1 pairs were skipped, for a picture or label that is broken or missing."]
    for path in folder.glob("*_*.*"):
        path.write_text("broken")
    with pytest.raises(SpoError, match="None of the 8 pairs can be trained on"):
        train_clip(model, host, open_pairs(folder), replace(settings, replace=True), Watcher())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"steps": 0}, "steps is 0; accepted are numbers from 1"),
        ({"width": 65}, "width is 65 pixels; accepted are multiples of 8"),
        ({"save_precision": "int8"}, 'save_precision is "int8"'),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
    ],
)
def test_settings_are_checked(tmp_path, changes, said):
    with pytest.raises(SpoError, match=said):
        settings_for(tmp_path, **changes)


def test_command_line(place, tmp_path, capsys):
    from spo.cli.main import main

    output = tmp_path / "spm.safetensors"
    arguments = [
        "train-preference", "--kind", "clip", "--data", place / "pairs", "--checkpoint", place / "tiny.safetensors",
        "--start", place / "PickScore_v1", "--output", output, "--steps", "1", "--pairs-per-call", "2",
        "--accumulation", "1", "--width", "64", "--height", "64", "--held-out-one-in", "4", "--device", "cpu",
    ]  # fmt: skip
    assert main([str(argument) for argument in arguments]) == 0
    said = capsys.readouterr().out
    assert "t = 951" in said and str(output) in said
    assert (tmp_path / "spm.spo" / "accuracy.png").exists()
    config = json.loads(metadata_of(output)["clip_config"])
    assert config["vision_config"]["num_attention_heads"] == 3
    assert main([str(argument) for argument in arguments]) == 2
    assert "exists already" in capsys.readouterr().err


def metadata_of(path):
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return file.metadata()


def test_several_processes_train_the_model_that_one_does(place, tmp_path):
    """Three passes an update, so that of two processes one has two; the files are the main one's."""
    config = build_config({"checkpoint": str(place / "tiny.safetensors"), "device": "cpu", "width": 64, "height": 64})

    def trained(processes):
        settings = settings_for(tmp_path / f"by{processes.count}", steps=2, accumulation=3, save_every=0)
        host, source = load_host(config), open_pairs(str(place / "pairs"))
        with one_by_one:  # it seeds PyTorch's generator, which threads share
            model = starting_model(place / "PickScore_v1")
        return train_clip(model, host, source, settings, Watcher(), processes=processes)

    one_by_one = threading.Lock()
    (alone,) = together(1, trained)
    for report in together(2, trained):
        assert report.finished and report.steps == 2
        assert [one.pairs for one in report.accuracy] == [one.pairs for one in alone.accuracy]
    rows = [list(csv.DictReader(one.files.metrics.open())) for one in (alone, report)]
    assert [row["step"] for row in rows[0]] == [row["step"] for row in rows[1]] == ["1", "2"]
    first, other = (run[0] for run in rows)
    for column in ("loss", "gradient_norm"):
        assert float(first[column]) == pytest.approx(float(other[column]), rel=1e-5)
    # Adam's first step is as large for a gradient of rounding alone as for any other
    assert float(rows[0][1]["loss"]) == pytest.approx(float(rows[1][1]["loss"]), abs=1e-3)

"""The table of kinds: listing, describing, what other files are called, and what a new kind takes."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from spo.algorithm.preference import Candidates
from spo.checkpoint.tensor_file import read_tensors
from spo.cli.inspect_file import describe_file
from spo.errors import SpoError
from spo.preference.cnn_file import save_cnn
from spo.preference.latent_cnn import LatentCNN
from spo.preference.load import (
    BUNDLED,
    BUNDLED_FILES,
    KINDS,
    Kind,
    describe_preference,
    list_preference_models,
    load,
    named_after,
)
from tests.preference.clip.test_scores import head_of, save_folder, transformers_clip
from tests.tiny_checkpoints import write_tiny_sd15

TIME = "vision_model.encoder.layers.0.adaLN_modulation.1.bias"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("preference")
    save_folder(transformers_clip(), place / "PickScore_v1")
    torch.save({TIME: torch.ones(1)}, place / "sd-v1-5_step-aware_preference_model.bin")
    save_file({TIME: torch.ones(1)}, place / "mine.safetensors", {"architecture": "sdxl"})
    save_cnn(LatentCNN(width=16), place / "taste.safetensors", {"architecture": "sd15"})
    torch.save(head_of("linear", 20).state_dict(), place / "sa_0_4_vit_l_14_linear.pth")
    (place / "mix.json").write_text('{"models": [{"file": "taste.safetensors", "weight": 1}]}')
    (place / "notes.txt").write_text("none of this")
    (place / "other.json").write_text("{}")
    (place / "named.safetensors").write_text("this is a text file under a wrong name")
    save_file({"lora_unet_x.lora_down.weight": torch.ones(1)}, place / "lora.safetensors")
    return place


def test_a_folder(folder):
    found = list_preference_models(folder)
    table = {info.name: (info.kind, info.sees, info.knows_timestep, info.architecture) for info in found.models}
    assert table == {
        "PickScore_v1": ("CLIP score", "pixels", False, "any"),
        "sd-v1-5_step-aware_preference_model": ("step-aware CLIP", "pixels", True, "sd15"),
        "mine": ("step-aware CLIP", "pixels", True, "sdxl"),
        "taste": ("latent CNN", "denoised latents", True, "sd15"),
        "sa_0_4_vit_l_14_linear": ("aesthetic score", "pixels", False, "any"),
        "mix: 1*taste": ("mix", "denoised latents", True, "sd15"),
    }
    assert len(found.refused) == 2
    assert '"lora.safetensors" is a LoRA; a preference model is needed.' in found.refused
    assert any('"named.safetensors" is a text file' in text for text in found.refused)
    sizes = {info.name: info.size_bytes for info in found.models}
    assert sizes["taste"] == (folder / "taste.safetensors").stat().st_size == sizes["mix: 1*taste"]


def test_one_file_and_the_demo(folder):
    (info,) = list_preference_models(BUNDLED_FILES[BUNDLED]).models
    assert info.text() == "preference (latent CNN, 45 kB, sees denoised latents, knows the timestep, for sd15)"
    assert list_preference_models(folder / "PickScore_v1").models[0].kind == "CLIP score"


def test_advice(folder):
    spm = describe_preference(folder / "sd-v1-5_step-aware_preference_model.bin")
    assert spm.advice("sd15") == ""
    assert "was made for sd15, the checkpoint is sdxl" in spm.advice("sdxl")
    assert "sdxl_step-aware_preference_model.bin" in spm.advice("sdxl")
    plain = describe_preference(folder / "PickScore_v1")
    assert "ended below the untrained checkpoint" in plain.advice("sdxl")


def test_other_files_are_named(folder, tmp_path):
    write_tiny_sd15(tmp_path / "model.safetensors")
    with pytest.raises(SpoError, match="is a Stable Diffusion 1.5 checkpoint; a preference model is needed"):
        describe_preference(tmp_path / "model.safetensors")
    with pytest.raises(SpoError, match="is a text file"):
        describe_preference(folder / "notes.txt")
    with pytest.raises(SpoError, match="there is no file or folder"):
        list_preference_models(tmp_path / "none")
    save_file({"emb_params": torch.ones(2, 768)}, tmp_path / "embedding.safetensors")
    with pytest.raises(SpoError, match="is a textual inversion embedding"):
        describe_preference(tmp_path / "embedding.safetensors")


@pytest.mark.parametrize(
    ("name", "architecture"),
    [("sdxl_spm.bin", "sdxl"), ("SD-v1.5 spm", "sd15"), ("spm", None), ("sd15_and_sdxl", None)],
)
def test_named_after(name, architecture):
    assert named_after(name) == architecture


def test_a_mix_in_words(folder):
    info = describe_preference(f"0.7*{folder / 'taste.safetensors'} + 0.3*{folder / 'PickScore_v1'}")
    assert (info.kind, info.sees, info.knows_timestep, info.architecture) == ("mix", "pixels", False, "sd15")
    assert info.name == "0.7*taste + 0.3*PickScore_v1"


# ---- another preference model: its module (here, this test) and one row of the table


class Brightness:
    """Prefers latents whose first channel is high; one number in its file says how much."""

    needs_pixels, needs_denoised = False, False

    def __init__(self, weight, name):
        self.weight, self.name = weight, name

    def score(self, candidates, prompts):
        return self.weight * candidates.x[:, :, 0].mean((2, 3))


def read_brightness(file, name, place):
    return Brightness(read_tensors(file, ["brightness"])["brightness"].to(place.device), name)


def test_another_kind_takes_one_row(tmp_path, monkeypatch):
    row = Kind("brightness", lambda file: "brightness" in file.tensors, read_brightness, Brightness, False)
    monkeypatch.setattr("spo.preference.load.KINDS", (*KINDS, row))
    save_file({"brightness": torch.tensor(2.0)}, tmp_path / "bright.safetensors")
    info = list_preference_models(tmp_path).models[0]
    assert info.text() == "bright (brightness, 0 kB, sees noisy latents, without timestep, any checkpoint)"
    with pytest.warns(UserWarning, match="does not know the timestep"):
        model = load(tmp_path / "bright.safetensors")
    x = torch.randn(4, 2, 4, 8, 8)
    scores = model.score(Candidates(x, 1.0, 500.0, x, lambda latents: pytest.fail("decoded")), ["a", "b"])
    assert torch.equal(scores, 2 * x[:, :, 0].mean((2, 3)))
    assert "brightness" in describe_file(tmp_path / "bright.safetensors")


def test_unknown_names_list_the_choices():
    with pytest.raises(SpoError, match=r'"pickscore" is not known; accepted are "demo" and .*sdxl_step-aware_pref'):
        load("pickscore", architecture="sdxl")


def test_a_missing_file_says_where_to_put_which(tmp_path):
    path = tmp_path / "spm.bin"
    with pytest.raises(SpoError, match=r"sd-v1-5_step-aware_preference_model\.bin of huggingface\.co/SPO") as caught:
        load(path, architecture="sd15")
    assert str(path) in str(caught.value)

"""Judges: any model of the catalogue, on finished pictures."""

from __future__ import annotations

import math
import warnings

import pytest
import torch

from spo.errors import SpoError
from spo.evaluation.judges import Judge, load_judge
from spo.preference.clip.towers import normalize, token_ids
from spo.preference.latent_cnn import LatentCNN
from spo.preference.load import load
from tests.preference.clip.test_scores import save_folder, transformers_clip
from tests.tiny_host import MeanOfChannel


def test_the_demos_preference_model_is_one():
    judge = load_judge("demo", "cpu", "sd15")
    latents, pixels = torch.randn(3, 4, 8, 8), torch.zeros(3, 3, 64, 64)
    scores = judge.scores(pixels, latents, ["a", "b", "c"])
    network = load("demo")
    assert isinstance(network, LatentCNN)
    torch.testing.assert_close(scores, network(latents, torch.zeros(3)))
    assert judge.adherence == ""
    assert torch.equal(judge.adherence_of(scores), scores)


class Brightness:
    name, needs_pixels, needs_denoised = "brightness", True, True

    def score(self, candidates, prompts):
        return candidates.pixels().mean((2, 3, 4))


def test_a_judge_of_pictures_sees_them_clamped():
    pixels = torch.tensor([0.5, 3.0])[:, None, None, None].expand(2, 3, 16, 16)
    scores = Judge("b", Brightness()).scores(pixels, torch.zeros(2, 4, 2, 2), ["a", "b"])
    assert scores.tolist() == [0.5, 1.0]


def test_a_score_that_is_not_finite_is_refused():
    judge = Judge("m", MeanOfChannel(then=lambda scores: scores * math.nan))
    with pytest.raises(SpoError, match='"mean-of-channel" gave a score that is not finite'):
        judge.scores(torch.zeros(1, 3, 16, 16), torch.zeros(1, 4, 2, 2), ["a"])


def test_a_clip_says_how_well_a_picture_shows_its_prompt(tmp_path):
    """Its cosine by transformers' own CLIP; and no word about timesteps, which finished pictures do not have."""
    save_folder(transformers_clip(), tmp_path / "clip")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        judge = load_judge(str(tmp_path / "clip"), "cpu", "sdxl")
    pixels = torch.rand(2, 3, 28, 28, generator=torch.Generator().manual_seed(0)) * 2 - 1
    prompts = ["a red house", "a boat"]
    scores = judge.scores(pixels, torch.zeros(2, 4, 4, 4), prompts)
    clip = transformers_clip()
    with torch.no_grad():
        output = clip(input_ids=token_ids(prompts), pixel_values=normalize(pixels / 2 + 0.5))
    cosine = torch.nn.functional.cosine_similarity(output.image_embeds, output.text_embeds)
    assert judge.adherence == "cosine"
    torch.testing.assert_close(judge.adherence_of(scores), cosine, rtol=1e-4, atol=1e-5)


def test_what_is_no_judge_is_refused_as_for_training(tmp_path):
    with pytest.raises(SpoError, match='"pickscore" is not known'):
        load_judge("pickscore", "cpu", "sd15")


def test_the_demos_judges_and_the_checkpoint_they_are_for():
    """One that training never saw, and one that says whether the subject is still there."""
    adherence = load_judge("demo-adherence", "cpu", "sd15", checkpoint_name="spo-demo.safetensors")
    assert adherence.adherence == "log-probability" and not adherence.prefers
    scores = adherence.scores(torch.zeros(1, 3, 64, 64), torch.zeros(1, 4, 8, 8), ["red apple"])
    assert torch.equal(adherence.adherence_of(scores), scores) and float(scores) < 0
    pictures = torch.rand(4, 3, 64, 64) * 2 - 1
    likeliest = adherence.model.network(pictures).argmax(1).tolist()
    found = [adherence.model.classes[number] for number in likeliest]
    others = [adherence.model.classes[number - 1] for number in likeliest]
    assert adherence.recognised(pictures, [*found[:3], others[3]]).tolist() == [True, True, True, False]
    assert load_judge("demo-judge", "cpu", "sd15", checkpoint_name="demo").adherence == ""
    for name in ("demo", "demo-judge", "demo-adherence", "0.5*demo-judge + 0.5*demo"):
        with pytest.raises(SpoError, match="knows the demo checkpoint's pictures only; the checkpoint is my_model"):
            load_judge(name, "cpu", "sd15", checkpoint_name="my_model.safetensors")

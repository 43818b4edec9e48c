"""Mixes: formula, files, errors."""

from __future__ import annotations

import json
import math

import pytest
import torch

from spo.algorithm.pairs import select_pairs
from spo.algorithm.preference import Candidates
from spo.errors import SpoError
from spo.preference.load import load
from spo.preference.mix import (
    MixedScore,
    MixPart,
    PoolScoresOfModel,
    is_mix,
    measured,
    models_of,
    read_mix,
    write_mix,
)


class Fixed:
    """A model that says the same scores of every pool."""

    def __init__(self, scores, needs_pixels=False):
        self.scores, self.needs_pixels, self.name = torch.tensor(scores), needs_pixels, "fixed"
        self.needs_denoised = True

    def score(self, candidates, prompts):
        return self.scores


LATENTS = torch.zeros(3, 1, 4, 2, 2)
POOL = Candidates(LATENTS, 1.0, 100.0, LATENTS, lambda flat: flat)


def test_formula_by_hand():
    a, b = Fixed([[1.0], [3.0], [2.0]]), Fixed([[0.5], [0.1], [0.3]], needs_pixels=True)
    mix = MixedScore([MixPart("a", 3.0, 2.0), MixPart("b", 1.0, 0.2)], [a, b], "ab")
    # scale 2 / 4; a: 0.5 * 3 / 2 = 0.75; b: 0.5 * 1 / 0.2 = 2.5
    expected = torch.tensor([[0.75 * 1 + 2.5 * 0.5], [0.75 * 3 + 2.5 * 0.1], [0.75 * 2 + 2.5 * 0.3]])
    assert torch.allclose(mix.score(POOL, [""]), expected)
    assert mix.needs_pixels and mix.needs_denoised


def test_a_mix_of_one_is_that_model_whatever_its_weight():
    one = Fixed([[1.0], [3.0], [2.0]])
    assert torch.equal(MixedScore([MixPart("a", 0.25, 7.0)], [one], "a").score(POOL, [""]), one.scores)


def test_pools_of_near_equals_stay_near_equal():
    """Why nothing is normalized within a pool: such a pool would be kept like one with a clear winner."""
    parts = [MixPart("a", 0.5), MixPart("b", 0.5)]
    near = MixedScore(parts, [Fixed([[0.0], [0.01], [0.02]])] * 2, "n").score(POOL, [""])
    clear = MixedScore(parts, [Fixed([[0.0], [1.0], [2.0]])] * 2, "c").score(POOL, [""])
    assert not select_pairs(near, 0.3).kept.any() and select_pairs(clear, 0.3).kept.all()
    standardized = (near - near.mean(0)) / near.std(0)
    assert select_pairs(standardized, 0.3).kept.all()


def test_measured_deviation_is_that_within_pools():
    pools = [torch.tensor([[0.0, 10.0], [2.0, 10.0]]), torch.tensor([[5.0], [5.0]])]
    (part,) = measured([MixPart("a", 1.0)], [PoolScoresOfModel(pools)])
    assert part.deviation == pytest.approx(math.sqrt(2 / 3))  # variances 2, 0, 0; where pools lie does not count
    with pytest.raises(SpoError, match='"a" gives all candidates of a pool the same score'):
        measured([MixPart("a", 1.0)], [PoolScoresOfModel([torch.ones(3, 2)])])


def test_text_and_files(tmp_path):
    parts = read_mix("0.7*spm.bin + .3 * sub folder/hps 2.pt")
    assert parts == (MixPart("spm.bin", 0.7), MixPart("sub folder/hps 2.pt", 0.3))
    write_mix(tmp_path / "mix.json", [MixPart("spm.bin", 0.7, 1.5), MixPart("demo", 0.3)])
    assert read_mix(str(tmp_path / "mix.json")) == (MixPart(str(tmp_path / "spm.bin"), 0.7, 1.5), MixPart("demo", 0.3))
    (tmp_path / "mix.yaml").write_text("models:\n- {file: demo, weight: 2}\n")
    assert read_mix(str(tmp_path / "mix.yaml")) == (MixPart("demo", 2.0),)
    assert is_mix("1*demo") and is_mix("a.json") and not is_mix("demo") and not is_mix("a.safetensors")


def test_loads(tmp_path):
    model = load("0.5*demo + 0.5*demo")
    assert model.name == "0.5*demo + 0.5*demo" and not model.needs_pixels
    latents = torch.randn(3, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    pool = Candidates(latents, 1.0, 100.0, latents, lambda flat: flat)
    assert torch.allclose(model.score(pool, [""]), load("demo").score(pool, [""]))
    with pytest.raises(SpoError, match="there is no preference model at"):
        load(f"0.5*demo + 0.5*{tmp_path / 'none.safetensors'}")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"models": [{"file": "a", "weight": 0}]}, "has the weight 0; accepted are numbers above 0"),
        ({"models": [{"file": "a", "weight": 1, "deviation": -1}]}, "has the deviation -1"),
        ({"models": [{"file": "a", "weight": 1, "deviance": 1}]}, '"deviance", did you mean "deviation"'),
        ({"models": [{"file": "a"}]}, "a file, a weight and perhaps a deviation"),
        ({"models": [{"file": "mix.json", "weight": 1}]}, "a mix itself; accepted are files of preference models"),
        ({"models": []}, "is no mix of preference models"),
        ([1], "is no mix of preference models"),
    ],
)
def test_wrong_files_are_one_sentence(tmp_path, content, said):
    path = tmp_path / "mix.json"
    path.write_text(json.dumps(content))
    with pytest.raises(SpoError, match=said):
        read_mix(str(path))


def test_broken_files(tmp_path):
    for name, text in (("a.json", "{"), ("b.yaml", "a: [")):
        (tmp_path / name).write_text(text)
        with pytest.raises(SpoError, match="is not valid"):
            read_mix(str(tmp_path / name))
    with pytest.raises(SpoError, match="cannot be read"):
        read_mix(str(tmp_path / "none.json"))
    with pytest.raises(SpoError, match='"b.bin" is no part of a mix'):
        read_mix("0.7*a.bin + b.bin")


def test_the_demos_taste_is_mixed_with_its_adherence():
    """Candidates at a noise level, as training scores them: the mean of both by weight, in the size of the first."""
    mix = load("0.8*demo + 0.2*demo-adherence")
    torch.manual_seed(0)
    latents, pictures = torch.randn(2, 3, 4, 8, 8), torch.rand(6, 3, 64, 64) * 2 - 1
    pool = Candidates(latents, 3.0, 451.0, latents, lambda flat: pictures)
    prompts = ["red apple", "rocket", "skull"]
    taste, adherence = (load(name).score(pool, prompts) for name in ("demo", "demo-adherence"))
    torch.testing.assert_close(mix.score(pool, prompts), 0.8 * taste + 0.2 * adherence)
    assert mix.needs_pixels and mix.needs_denoised


def test_models_of_a_name(tmp_path):
    assert models_of("demo") == ["demo"]
    assert models_of("0.5*a.safetensors + 2*demo") == ["a.safetensors", "demo"]
    gone = str(tmp_path / "gone.json")
    assert models_of(gone) == [gone]

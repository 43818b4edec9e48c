"""The subject classifier that comes with the demo."""

from __future__ import annotations

import pytest
import torch

from spo.demo.judge import HERE, held_out
from spo.demo.subjects import SubjectClassifier, load
from spo.preference.subject_score import SubjectNetwork
from spo.prompts import read_prompts


def test_it_knows_every_prompt_of_the_demo():
    classifier = load(HERE / "subject_classifier.safetensors")
    assert len(set(classifier.classes)) == len(classifier.classes) == 415
    assert {*held_out()[0], *read_prompts(HERE / "prompts.txt")} <= set(classifier.classes)


def test_pictures_are_assigned_one_by_one_whatever_the_batch():
    torch.manual_seed(0)
    classifier = SubjectClassifier(SubjectNetwork(5), list("abcde"))
    pixels = torch.rand(300, 3, 64, 64) * 2 - 1
    assigned = classifier.assign(pixels.half())
    assert (assigned.dtype, assigned.shape) == (torch.int64, (300,))
    assert torch.equal(assigned[:7], classifier.assign(pixels[:7].half().float()))
    assert not any(parameter.requires_grad for parameter in classifier.network.parameters())


def test_a_missing_file(tmp_path):
    with pytest.raises(OSError):
        load(tmp_path / "none.safetensors")

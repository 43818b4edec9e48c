"""An evaluation in whole, and what its reader must know first."""

from __future__ import annotations

import pytest
import torch

from spo.evaluation.features import pixel_features
from spo.evaluation.judges import Judge
from spo.evaluation.provenance import CHOSE, FOLLOWED, UNKNOWN, UNSEEN, Training
from spo.evaluation.statistics import measure
from spo.evaluation.summary import Column, remarks, summarize
from tests.tiny_host import MeanOfChannel

TRAINING = Training("demo", frozenset({"a"}))
MANY = [f"prompt {number}" for number in range(12)]


def summary(trainings=(TRAINING,)):
    prompts, judges = ["a", "a", "b", "b"], [Judge("mean", MeanOfChannel())]
    draws = torch.Generator().manual_seed(0)
    columns = {}
    for label in ("base", "lora"):
        pixels, latents = torch.rand(4, 3, 16, 16, generator=draws), torch.randn(4, 4, 2, 2, generator=draws)
        columns[label] = Column(measure(pixels, latents, prompts, judges, pixel_features()), [label.encode()] * 4)
    return summarize(
        "tiny against lora", {"Checkpoint": "tiny"}, columns, prompts, [1, 2, 3, 4], judges, pixel_features(), trainings
    )


def test_all_parts_have_the_same_rows():
    whole = summary()
    assert list(whole.columns) == ["base", "lora"]
    assert whole.facts["Prompts"] == "2, 4 pictures in each column"
    assert whole.facts["Seeds"] == "1 to 4, the same in each column"
    assert whole.facts["Judges"] == f"mean ({UNSEEN})"
    assert next(iter(whole.facts)) == "Checkpoint"
    (judge,) = whole.judges
    assert [len(judge.scores[label]) for label in whole.columns] == [4, 4]
    assert list(whole.drifts) == ["lora"] and len(whole.drifts["lora"]) == 4
    assert whole.pictures["lora"][3] == b"lora"
    assert "1 of 2 prompts were trained on; held-out ones tell more." in whole.remarks


@pytest.mark.parametrize(
    ("roles", "sentence"),
    [
        ({"demo": FOLLOWED}, "No judge here is known to be one that training never saw."),
        ({}, "No judge here is known to be one that training never saw."),
        ({"demo": FOLLOWED, "other": UNSEEN}, "Training followed demo: that its score rises is what training did"),
        ({"other": CHOSE}, "Training did not follow other, but chose its best stage by it"),
        (
            {"a": CHOSE, "b": CHOSE},
            "Training did not follow a, b, but chose its best stage by them: their scores flatter",
        ),
        ({"demo": UNKNOWN}, "A LoRA does not say what it was trained on"),
    ],
)
def test_judges_are_said_for_what_they_are(roles, sentence):
    assert any(text.startswith(sentence) for text in remarks(roles, MANY, [TRAINING]))


def test_all_is_well():
    assert remarks({"other": UNSEEN}, MANY, [TRAINING]) == []
    assert remarks({"other": UNSEEN}, MANY[:4], [TRAINING])[0].startswith("4 prompts are few")

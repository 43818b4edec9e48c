"""Which column a held-out judge finds best, by the rule of stages; and a LoRA scaled to a weight."""

from __future__ import annotations

import pytest
import torch

from spo.errors import SpoError
from spo.evaluation.features import pixel_features
from spo.evaluation.judges import Judge
from spo.evaluation.provenance import Training
from spo.evaluation.statistics import Measured
from spo.lora.layer import LoraLayer
from spo.lora.read import read_lora
from spo.lora.write import write_lora
from spo.training.best_weight import best_column, choosing_judge, scalable, write_scaled
from tests.tiny_host import MeanOfChannel

PROMPTS = [f"prompt {number}" for number in range(8) for _ in range(2)]
TASTE = Judge("taste", MeanOfChannel())
WORD = Judge("word", MeanOfChannel(), "cosine", prefers=False)


def column(taste, word=0.9, spread=1.0, chance=None):
    """Pictures whose two seeds differ by `spread`, judged so by both, a little differently for each prompt."""
    little = torch.arange(len(PROMPTS)) / 1000
    features = torch.tensor([[0.0], [spread]]).repeat(8, 1)
    scores = {"taste": taste + little, "word": word + little}
    return Measured({}, scores, features, chance={} if chance is None else {"word": chance + little})


def choice_of(**others):
    columns = {"base": column(0.0, chance=0.1), **others}
    return best_column(columns, PROMPTS, TASTE, [TASTE, WORD], pixel_features())


def test_the_highest_score_is_best():
    choice = choice_of(half=column(1.0), whole=column(2.0), twice=column(1.5))
    assert (choice.label, choice.out) == ("whole", {})
    assert choice.gain.mean == pytest.approx(2.0)
    assert choice.text() == "Best by taste: whole, +2 (+2 to +2) against the base."


def test_a_weight_that_loses_adherence_or_diversity_is_out():
    choice = choice_of(half=column(1.0), blind=column(5.0, word=0.7), alike=column(6.0, spread=0.5))
    assert choice.label == "half" and set(choice.out) == {"blind", "alike"}
    assert choice.out["blind"]["adherence"].mean == pytest.approx(0.25)  # 0.2 of what lies between 0.9 and 0.1
    assert "alike is out: it lost 50% of the diversity." in choice.text()
    none = choice_of(blind=column(5.0, word=0.7))
    assert (none.label, none.gain) == ("", None) and none.text().startswith("None is best by taste.")


def test_a_gain_that_may_be_chance_is_called_so():
    unsteady = column(0.0)
    unsteady.scores["taste"][::4] += 3.0
    unsteady.scores["taste"][2::4] -= 2.9
    assert "That is no certain gain." in choice_of(unsteady=unsteady).text()


def test_who_chooses_is_a_judge_that_training_did_not_follow():
    other = Judge("other", MeanOfChannel())
    followed = [Training("taste", frozenset())]
    assert choosing_judge([WORD, TASTE, other], followed) is other
    assert choosing_judge([TASTE], followed) is None


@pytest.fixture
def lora(tmp_path):
    torch.manual_seed(0)
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    metadata = {
        "ss_output_name": "mine",
        "ss_network_alpha": "4.0",
        "spo_config": "{}",
        "ss_base_model_version": "sd_v1",
    }
    layers = {name: LoraLayer(torch.randn(4, 320), torch.randn(320, 4), 4.0)}
    write_lora(tmp_path / "mine.safetensors", layers, metadata)
    return tmp_path / "mine.safetensors"


def test_the_scaled_file_changes_weights_by_that_share(lora, tmp_path):
    output = tmp_path / "scaled.safetensors"
    file = scalable(lora, output)
    write_scaled(file, 0.75, output)
    scaled = read_lora(output)
    ((name, layer),) = file.layers.items()
    after = scaled.layers[name]
    assert torch.equal(after.up, layer.up) and torch.equal(after.down, layer.down) and after.alpha == 3.0
    assert scaled.dtype == file.dtype == "float16"
    assert scaled.metadata["ss_output_name"] == "scaled" and scaled.metadata["ss_network_alpha"] == "3.0"
    assert (scaled.metadata["spo_scaled_from"], scaled.metadata["spo_scaled_by"]) == ("mine", "0.75")
    assert scaled.metadata["sshs_model_hash"] != file.metadata["sshs_model_hash"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mine.safetensors", "is not replaced"),
        ("scaled.pt", "end in .safetensors"),
        ("no/scaled.safetensors", "does not exist"),
    ],
)
def test_where_it_cannot_be_written_is_said_before_anything_is_sampled(lora, tmp_path, name, message):
    with pytest.raises(SpoError, match=message):
        scalable(lora, tmp_path / name)

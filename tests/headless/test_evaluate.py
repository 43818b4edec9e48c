"""Evaluating on the headless host: its rows, files, and refusals before anything is sampled."""

from __future__ import annotations

import pytest
import torch

from spo.errors import SpoError
from spo.evaluation.features import pixel_features
from spo.evaluation.judges import Judge
from spo.evaluation.summary import FIRST_SEED, rows_of
from spo.headless.evaluate import EvaluateRequest, _column, lora_files_of
from tests.headless.test_compare import PROMPTS, Tripping, TrippingTaste
from tests.threads import together


def test_rows_have_each_prompt_with_the_same_seeds_or_with_its_own():
    assert rows_of(["a", "b"], [7, 8], 4) == [("a", 7), ("a", 8), ("b", 7), ("b", 8)]
    own = rows_of(["a", "b"], [], 3)
    assert own == [(prompt, FIRST_SEED + number) for number, prompt in enumerate("aaabbb")]


def test_a_run_has_its_stages_and_its_lora(tmp_path):
    folder = tmp_path / "mine.spo"
    folder.mkdir()
    with pytest.raises(SpoError, match='there is no "mine.safetensors" and no stage of it'):
        lora_files_of(folder)
    for name in ("mine-step000200", "mine-step000100", "mine", "mine-other"):
        (tmp_path / f"{name}.safetensors").touch()
    assert [path.stem for path in lora_files_of(folder)] == ["mine-step000100", "mine-step000200", "mine"]
    with pytest.raises(SpoError, match="is no run's folder; give the NAME.spo"):
        lora_files_of(tmp_path)


@pytest.mark.parametrize("place", ["sample", "decode", "score"])
def test_out_of_memory_halves_what_is_done_at_a_time_and_goes_on(place):
    request = EvaluateRequest(PROMPTS, [1, 2, 3], loras=[], weights=[1.0], judges=[], batch=3)

    def column(host):
        judge = Judge("taste", TrippingTaste(host))
        return _column(host, host.config, request, [judge], pixel_features())

    with pytest.warns(UserWarning, match="Out of memory: going on with pictures at a time 2"):
        made = column(Tripping(place))
    expected = column(Tripping("nowhere"))
    assert len(made.pictures) == 3
    torch.testing.assert_close(made.measured.scores["taste"], expected.measured.scores["taste"])
    torch.testing.assert_close(made.measured.features, expected.measured.features, rtol=0, atol=1e-3)


@pytest.mark.parametrize("count", [2, 4])
def test_several_processes_share_the_pictures_and_all_have_the_whole_column(count):
    request = EvaluateRequest(PROMPTS, [1, 2, 3], loras=[], weights=[1.0], judges=[], batch=3)

    def column(processes):
        host = Tripping("nowhere")
        judges = [Judge("taste", TrippingTaste(host))]
        return _column(host, host.config, request, judges, pixel_features(), processes)

    (alone,) = together(1, column)
    for made in together(count, column):
        assert len(made.pictures) == len(alone.pictures) == 3
        torch.testing.assert_close(made.measured.scores["taste"], alone.measured.scores["taste"])
        torch.testing.assert_close(made.measured.features, alone.measured.features, rtol=0, atol=1e-3)

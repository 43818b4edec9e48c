"""Training a step-aware CLIP on the loaded checkpoint, in a real WebUI where SPO_WEBUI_DIR names one."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from spo.errors import SpoError
from spo.training.clip import ClipTraining
from spo.webui import seam
from spo.webui.jobs import clip_training
from tests.preference.clip.test_pair_data import write_folder
from tests.preference.clip.test_scores import save_folder, transformers_clip
from tests.webui import stand_in
from tests.webui import test_host as host
from tests.webui.jobs import test_voting

webui, no_webui, models = host.webui, stand_in.webui, test_voting.models
in_webui = pytest.mark.skipif(not os.environ.get("SPO_WEBUI_DIR"), reason="SPO_WEBUI_DIR does not name a WebUI")


@pytest.mark.parametrize(
    ("settings", "advice"),
    [
        ({"train_text": True}, "keep the text tower as it is and take 8-bit moments to need less"),
        ({"train_text": False}, "take 8-bit moments to need less"),
        ({"train_text": True, "optimizer": "adamw8bit"}, "keep the text tower as it is to need less"),
        ({"train_text": False, "optimizer": "adamw8bit"}, "start from a smaller CLIP"),
    ],
)
def test_what_cannot_fit_the_card_is_refused_with_what_would_help(no_webui, monkeypatch, settings, advice):
    monkeypatch.setattr(seam.webui, "card", lambda: seam.webui.Card("the card", 12.0))
    asked = ClipTraining(output=Path("mine.safetensors"), **settings)
    clip_training._check_memory(9 * 2**30, asked)
    with pytest.raises(SpoError, match=rf"takes 21\.0 GB and some 3 GB .* the card has 12: {advice}"):
        clip_training._check_memory(21 * 2**30, asked)


@in_webui
def test_a_step_aware_clip_is_trained_on_the_loaded_checkpoint(models):
    from spo.preference.load import describe_preference
    from spo.webui.jobs import job

    host.load("tiny-sd1")
    before = host.txt2img("Euler a")
    (models / "pairs").mkdir(parents=True)
    save_folder(transformers_clip(), models / "PickScore_v1")
    write_folder(models / "pairs" / "reds", 16)
    request = clip_training.ClipRequest(
        "mine", "reds", "PickScore_v1", steps=2, pairs_per_call=2, accumulation=1,
        learning_rate=1e-3, size_px=64,
    )  # fmt: skip
    started = clip_training.start_clip_training(request)
    job._thread.join(300)
    assert started.phase == "finished", started.message
    assert describe_preference(models / "mine.safetensors").kind == "step-aware CLIP"
    assert np.array_equal(host.txt2img("Euler a"), before)
    with pytest.raises(SpoError, match="exists already"):
        clip_training.start_clip_training(request)

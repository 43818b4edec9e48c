"""Training a step-aware CLIP on the loaded checkpoint, in a real WebUI where SPO_WEBUI_DIR names one."""

from __future__ import annotations

import os

import numpy as np
import pytest

from spo.errors import SpoError
from tests.preference.clip.test_pair_data import write_folder
from tests.preference.clip.test_scores import save_folder, transformers_clip
from tests.webui import test_host as host
from tests.webui.jobs import test_voting

webui, models = host.webui, test_voting.models
pytestmark = pytest.mark.skipif(not os.environ.get("SPO_WEBUI_DIR"), reason="SPO_WEBUI_DIR does not name a WebUI")


def test_a_step_aware_clip_is_trained_on_the_loaded_checkpoint(models):
    from spo.preference.load import describe_preference
    from spo.webui.jobs import clip_training, job

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

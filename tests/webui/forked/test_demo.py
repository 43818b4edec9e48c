"""What somebody reads who presses the demo's button in a fork."""

from __future__ import annotations

import pytest

from spo.errors import SpoError
from spo.webui import forge, reforge
from spo.webui.jobs import training


@pytest.mark.parametrize("fork", [forge, reforge])
def test_the_demo_is_refused_before_anything_is_written(monkeypatch, fork):
    monkeypatch.setattr(training, "webui", fork)
    with pytest.raises(SpoError, match=r"AUTOMATIC1111's WebUI only\. Load a checkpoint of yours"):
        training.start_demo()

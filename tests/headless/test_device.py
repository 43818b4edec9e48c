"""Which device computes, and in which precision."""

from __future__ import annotations

import pytest
import torch

from spo.errors import SpoError
from spo.headless.device import choose_device, choose_dtype


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device("auto") == torch.device("cuda")
    for name in ("gpu", "meta9"):
        with pytest.raises(SpoError, match=f'device "{name}" cannot be used here .*; accepted are auto, cpu, cuda'):
            choose_device(name)


def test_precisions() -> None:
    cpu = torch.device("cpu")
    assert choose_dtype("auto", cpu) == torch.float32
    assert choose_dtype("bfloat16", cpu) == torch.bfloat16
    assert choose_dtype("auto", torch.device("meta")) == torch.float16

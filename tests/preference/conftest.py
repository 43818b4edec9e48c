"""Pickles are read in these tests whatever torch there is: they are made here. test_pickles.py tests the refusal."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def pickles_are_read(monkeypatch):
    monkeypatch.setattr("spo.checkpoint.tensor_file.FIRST_SAFE_TORCH", (2, 0))

"""Named groups of settings."""

from __future__ import annotations

import pytest

from spo.config import build_config
from spo.errors import SpoError
from spo.presets import NAMED, preset


def test_presets_are_complete_settings():
    for name, found in NAMED.items():
        config = build_config({**found.values, "checkpoint": "a", "output": "b"}, found.architecture or "sd15")
        flat = config.flat()
        assert all(flat[key] == value for key, value in found.values.items()), name
    with pytest.raises(SpoError, match='did you mean "quick"'):
        preset("quik")

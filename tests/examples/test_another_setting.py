"""Another setting: one line in a record of config.py. Flags, the API's names, metadata and messages follow."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, make_dataclass

import pytest

from spo import config
from spo.cli.settings_flags import add_settings, given_values
from spo.errors import SpoError


@dataclass(frozen=True)
class LossConfigWithMargin(config.LossConfig):
    margin: float = config._setting(0.5, "how far apart the ratios shall come", low=0, high=4)


@pytest.fixture
def extended(monkeypatch):
    """config.py with one more line in LossConfig."""
    fields = [(name, hint) for name, hint in config.Config.__annotations__.items()]
    types = {**vars(config), "LossConfig": LossConfigWithMargin}
    whole = make_dataclass(
        "Config", [(name, types[hint]) for name, hint in fields], frozen=True, namespace={"flat": config.Config.flat}
    )
    monkeypatch.setattr(config, "LossConfig", LossConfigWithMargin)
    monkeypatch.setattr(config, "Config", whole)
    config.settings.cache_clear()
    yield
    config.settings.cache_clear()


def test_one_line_makes_a_setting(extended):
    parser = argparse.ArgumentParser()
    add_settings(parser)
    values = given_values(parser.parse_args(["--margin", "0.25"]))
    built = config.build_config(values)
    assert built.loss.margin == 0.25
    assert built.flat()["margin"] == 0.25
    assert "how far apart" in parser.format_help()
    with pytest.raises(SpoError, match=r"margin is 5\.0; accepted is 0 to 4"):
        config.build_config({"margin": 5})
    with pytest.raises(SpoError, match='did you mean "margin"'):
        config.build_config({"margn": 5})

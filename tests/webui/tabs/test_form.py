"""The form is made of the configuration: a setting that is added there is in the tab, the API and the command line."""

from __future__ import annotations

import dataclasses

import pytest

pytest.importorskip("gradio")
pytest.importorskip("fastapi")

from spo import config
from spo.cli import main
from spo.webui.api import bodies
from spo.webui.tabs import form


@pytest.fixture
def flavour(monkeypatch):
    """One more setting, of the section "run"."""
    setting = config._setting("mild", "how it tastes", "mild", "hot")
    longer = dataclasses.make_dataclass(
        "RunConfig", [("flavour", str, setting)], bases=(config.RunConfig,), frozen=True
    )
    monkeypatch.setattr(config, "RunConfig", longer)
    config.settings.cache_clear()
    yield
    config.settings.cache_clear()


def test_a_setting_is_added_in_one_file(flavour):
    import gradio

    assert config.build_config({"flavour": "hot"}).flat()["flavour"] == "hot"
    with gradio.Blocks():
        field = form.advanced_fields()["flavour"]
    assert (field.choices, field.value, field.label) == (["mild", "hot"], "mild", "Flavour")
    assert form.read(form.field_values({"flavour": "hot"}))["flavour"] == "hot"
    assert bodies.settings_schema()["flavour"]["enum"] == ["mild", "hot"]
    assert main.parser().parse_args(["train", "--flavour", "hot"]).flavour == "hot"

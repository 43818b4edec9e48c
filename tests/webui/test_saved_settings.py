"""Saved settings, over a stand-in for the WebUI."""

from __future__ import annotations

import pytest

from spo.errors import SpoError
from spo.webui import saved_settings
from tests.webui import stand_in
from tests.webui.test_runs import make_run

webui = stand_in.webui


def test_settings_are_saved_once_and_loaded_without_the_hosts_own(webui):
    saved_settings.save("my set", {"rank": 8, "learning_rate": 1e-4})
    assert saved_settings.load("my set") == {"rank": 8, "learning_rate": 1e-4}
    with pytest.raises(SpoError, match="exists already"):
        saved_settings.save("my set", {})
    with pytest.raises(SpoError, match="the name of the settings"):
        saved_settings.save("../x", {})
    make_run("vivid")
    assert saved_settings.names() == ["my set", "run: vivid"]
    assert saved_settings.load("run: vivid") == {"steps": 9, "learning_rate": 0.1}
    with pytest.raises(SpoError, match="no settings called"):
        saved_settings.load("run: none")

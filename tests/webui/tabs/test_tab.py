"""The whole tab, built: labels that are nobody else's, and nothing in ui-config.json; over a stand-in and for real."""

from __future__ import annotations

import json
import os
from collections import Counter

import pytest

gr = pytest.importorskip("gradio")

from spo.webui import seam  # noqa: E402
from spo.webui.tabs import tab  # noqa: E402
from tests.webui import stand_in  # noqa: E402
from tests.webui import test_host as host  # noqa: E402

webui = host.webui
no_webui = stand_in.webui
in_webui = pytest.mark.skipif(not os.environ.get("SPO_WEBUI_DIR"), reason="SPO_WEBUI_DIR does not name a WebUI")


def test_every_field_has_a_label_of_its_own(no_webui, monkeypatch):
    monkeypatch.setattr(seam.webui, "refresh_button", lambda *given: None)
    monkeypatch.setattr(seam.webui, "sampler_names", lambda: ["Euler a"])
    ((block, title, elem_id),) = tab.tabs()
    assert (title, elem_id) == ("SPO", "spo")
    fields = [component for component in block.blocks.values() if isinstance(component, gr.components.FormComponent)]
    fields = [field for field in fields if getattr(field, "visible", True) and getattr(field, "label", None)]
    labels = Counter(field.label for field in fields)
    assert len(labels) > 60
    assert [label for label, count in labels.items() if count > 1] == []
    assert all(component.do_not_save_to_config for component in block.blocks.values())


@in_webui
def test_the_webui_keeps_nothing_of_ours_in_its_ui_config(webui, tmp_path):
    from modules import ui_loadsave

    path = tmp_path / "ui-config.json"
    path.write_text("{}")
    ((block, _, elem_id),) = tab.tabs()
    loadsave = ui_loadsave.UiLoadsave(str(path))
    loadsave.add_block(block, elem_id)
    with gr.Blocks():
        loadsave.add_component("other/Rank", gr.Number(7, label="Rank"))
    loadsave.dump_defaults()
    assert json.loads(path.read_text()) == {"other/Rank/visible": True, "other/Rank/value": 7.0}

"""The same tab in Gradio 3 and 4."""

from __future__ import annotations

import pytest

gr = pytest.importorskip("gradio")

from spo.webui.tabs.gradio_versions import script, stays_at_top, uploads_only  # noqa: E402


def test_an_event_calls_the_page():
    with gr.Blocks(analytics_enabled=False) as block:
        button = gr.Button("go")
        button.click(None, [], [], **script("spo_go")).then(None, [], [], **script("() => 1"))
    assert [one["js"] for one in block.get_config_file()["dependencies"]] == ["spo_go", "() => 1"]


def test_a_picture_comes_from_a_file_only():
    with gr.Blocks(analytics_enabled=False):
        picture = gr.Image(type="pil", **uploads_only())
    config = picture.get_config()
    assert config.get("sources", [config.get("source")]) == ["upload"]


def test_a_box_stays_at_its_top():
    with gr.Blocks(analytics_enabled=False):
        box = gr.Textbox(**stays_at_top())
    assert not box.get_config().get("autoscroll", False)

"""The SPO tab: Train, Vote, Compare, Runs."""

from __future__ import annotations

from typing import Any

import gradio as gr

from spo.webui.tabs import compare, runs, train, vote


def tabs() -> list[tuple[Any, str, str]]:
    """For script_callbacks.on_ui_tabs."""
    with gr.Blocks(analytics_enabled=False) as block, gr.Tabs(elem_id="spo_tabs"):
        with gr.TabItem("Train", elem_id="spo_tab_train"):
            training = train.build()
        with gr.TabItem("Vote", elem_id="spo_tab_vote"):
            vote.build()
        with gr.TabItem("Compare", elem_id="spo_tab_compare"):
            comparison = compare.build()
        with gr.TabItem("Runs", elem_id="spo_tab_runs"):
            runs.build()
        outputs = [comparison.loras, comparison.prompts, comparison.width, comparison.height]
        training.compare.click(train.to_compare, [training.prompts], outputs, _js="spo_to_compare")
    for component in block.blocks.values():
        # the WebUI keeps values by label in ui-config.json, where computed ones would freeze; ours are saved settings
        component.do_not_save_to_config = True
    return [(block, "SPO", "spo")]

"""The SPO tab: Train, Preference, Compare, Runs; and what goes from one to another."""

from __future__ import annotations

from typing import Any

import gradio as gr

from spo.webui.tabs import compare, published, runs, train, vote, watch
from spo.webui.tabs.gradio_versions import script


def tabs() -> list[tuple[Any, str, str]]:
    """For script_callbacks.on_ui_tabs."""
    with gr.Blocks(analytics_enabled=False) as block:
        with gr.Tabs(elem_id="spo_tabs"):
            with gr.TabItem("Train", elem_id="spo_tab_train"):
                training = train.build()
            with gr.TabItem("Preference", elem_id="spo_tab_preference"):
                with gr.Accordion("Download the published model", open=False, elem_id="spo_published"):
                    downloads = published.build()
                preference = vote.build()
            with gr.TabItem("Compare", elem_id="spo_tab_compare"):
                comparison = compare.build()
            with gr.TabItem("Runs", elem_id="spo_tab_runs"):
                earlier = runs.build()
        seen = gr.Textbox("{}", label="Seen", elem_id="spo_seen")
        refresh, lists = gr.Button("Refresh", elem_id="spo_refresh"), gr.Button("Lists", elem_id="spo_lists")

        looks = watch.Looks(
            seen, training.area, comparison.area, training.running, training.finished, [*training.downloads, *downloads]
        )
        refresh.click(looks.look, [seen], looks.outputs, queue=False, show_progress="hidden")
        fields = [*training.lists, *preference.lists, *comparison.lists, *earlier]
        lists.click(_read_lists, [training.preference], fields, queue=False, show_progress="hidden")
        fields = [comparison.said, *comparison.asked]
        training.compare.click(compare.compare_last, [], fields, **script("spo_to_compare")).then(
            None, [], [], **script("spo_refresh_now")
        )
        fields = [training.prompts, preference.prompts]
        training.vote.click(vote.take_prompts, fields, [preference.prompts], **script("spo_to_vote"))
    for component in block.blocks.values():
        # the WebUI keeps values by label in ui-config.json, where computed ones would freeze; ours are saved settings
        component.do_not_save_to_config = True
    return [(block, "SPO", "spo")]


def _read_lists(preference: str | None) -> list[Any]:
    return [*train.read_lists(preference), *vote.read_lists(), *compare.read_lists(), *runs.read_lists()]

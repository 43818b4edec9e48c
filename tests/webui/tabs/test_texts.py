"""Every text of the tab is in the template of translations, and translated in the language that comes with it.

After a change of texts, `SPO_WRITE_TEXTS=1 python -m pytest tests/webui/tabs/test_texts.py` writes the template anew.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

gr = pytest.importorskip("gradio")

from spo.webui import seam, taste  # noqa: E402
from spo.webui.jobs import voting  # noqa: E402
from spo.webui.tabs import tab, texts  # noqa: E402
from tests.webui import stand_in  # noqa: E402

webui = stand_in.webui
ROOT = Path(__file__).parents[3]
TEMPLATE = ROOT / "docs" / "webui" / "localization_template.json"
LANGUAGES = sorted((ROOT / "localizations").glob("*.json"))


@pytest.fixture
def page_texts(webui, monkeypatch):
    """The texts of the whole tab, of the script in txt2img and img2img, and of the WebUI's settings page."""
    monkeypatch.setattr(seam.webui, "refresh_button", lambda *given: None)
    monkeypatch.setattr(seam.webui, "sampler_names", lambda: ["Euler a"])
    monkeypatch.setattr(voting, "_session", None)  # a page as it is at first, whatever other tests left
    ((block, _, _),) = tab.tabs()
    with gr.Blocks() as script:
        taste.build(False)
        taste.build(True)
    return [*sorted({*texts.texts(block), *texts.texts(script)}), seam.webui.TURNS_TEXT]


def test_the_template_has_every_text(page_texts):
    if os.environ.get("SPO_WRITE_TEXTS"):
        TEMPLATE.write_text(json.dumps(dict.fromkeys(page_texts, ""), indent=1, ensure_ascii=False) + "\n", "utf-8")
    assert list(json.loads(TEMPLATE.read_text("utf-8"))) == page_texts
    assert len(page_texts) > 200


@pytest.mark.parametrize("path", LANGUAGES, ids=lambda path: path.stem)
def test_a_language_leaves_nothing_out_and_has_nothing_more(page_texts, path):
    translated = json.loads(path.read_text("utf-8"))
    assert set(page_texts) - set(translated) == set()
    assert set(translated) - set(page_texts) == set()
    assert [text for text, other in translated.items() if not other.strip()] == []


def test_there_is_a_language():
    assert [path.stem for path in LANGUAGES] == ["de_DE"]


def test_texts_are_read_from_labels_hints_choices_and_paragraphs():
    with gr.Blocks() as block:
        gr.Radio(["Weak", "Strong"], label="Strength", info="How far.", elem_id="spo_strength")
        gr.Dropdown(["a.safetensors"], label="Model", elem_id="spo_preference")
        gr.Button("Go")
        gr.HTML("<p>One &amp; <b>two</b>, 3</p>")
        gr.Textbox(label="Hidden", elem_id="spo_seen")
        with gr.Accordion("More"):
            gr.Number(3, label="0.5")
    found = texts.texts(block)
    assert {"Weak", "Strong", "Strength", "How far.", "Model", "Go", "One &", "two", "More"} <= set(found)
    assert not {"a.safetensors", "Hidden", "0.5", ", 3"} & set(found)
    assert not any(re.fullmatch(r"\W*", text) for text in found)

"""Cards in the Lora tab: what they say, and that nobody's own preview or description is written over."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from PIL import Image

from spo.config import build_config
from spo.runs.layout import RunFiles
from spo.webui import cards


@pytest.fixture
def host(tmp_path):
    """asked: the pictures that were made, (prompt, seed)."""
    asked = []

    def picture(prompt, seed, infotext_prompt):
        asked.append((prompt, seed))
        return SimpleNamespace(images=[Image.new("RGB", (8, 8), "red")], infotext=f"{infotext_prompt}\nSeed: {seed}")

    values = {"output": str(tmp_path / "vivid.safetensors"), "preference": "demo", "rank": 6, "sample_seed": 11}
    return SimpleNamespace(
        config=build_config(values), checkpoint_name="dream", architecture="sdxl", prompts=["a fox", "a boat"],
        picture=picture, asked=asked,
    )  # fmt: skip


def test_a_card_names_the_lora_and_how_it_was_made(host, tmp_path):
    cards.write_card(host, tmp_path / "vivid-step000004.safetensors")
    facts = json.loads((tmp_path / "vivid-step000004.json").read_text())
    assert facts["sd version"] == "SDXL"
    assert facts["description"] == "SPO LoRA for dream, preference model demo, rank 6."
    assert RunFiles.of(tmp_path / "vivid.safetensors").settings.name in facts["notes"]
    with Image.open(tmp_path / "vivid-step000004.png") as preview:
        assert preview.text["parameters"] == "a fox <lora:vivid-step000004:1>\nSeed: 11"
    assert host.asked == [("a fox", 11)]


def test_what_is_there_already_stays(host, tmp_path):
    (tmp_path / "vivid.png").write_bytes(b"mine")
    (tmp_path / "vivid.json").write_text("mine")
    cards.write_card(host, tmp_path / "vivid.safetensors")
    assert ((tmp_path / "vivid.png").read_bytes(), (tmp_path / "vivid.json").read_text()) == (b"mine", "mine")
    assert host.asked == []


def test_cards_go_with_their_stages_and_no_others(tmp_path):
    names = {
        "vivid.json", "vivid-step000002.json", "vivid-step000002.png", "vivid-step000004.safetensors",
        "vivid-step000004.json", "vivid-step000004.png", "vivid-extra.png", "other-step000002.png",
    }  # fmt: skip
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    cards.drop_cards_without_lora(RunFiles.of(tmp_path / "vivid.safetensors"))
    assert names - {path.name for path in tmp_path.iterdir()} == {"vivid-step000002.json", "vivid-step000002.png"}

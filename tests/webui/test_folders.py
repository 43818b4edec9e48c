"""Names of LoRAs and where things lie, over a stand-in for the WebUI."""

from __future__ import annotations

from pathlib import Path

import pytest

from spo.errors import SpoError
from spo.webui import folders
from tests.webui import stand_in

webui = stand_in.webui


@pytest.mark.parametrize(
    "name",
    [
        "", "  ", "../a", "a/../b", "/etc/a", "C:/a", "c:a", "a\\b", "con", "NUL.txt", "com1", ".hidden", "a/.b", "a.",
        "a<b", "a:b", "a|b", "a?b", "a*b", 'a"b', "a\nb", "a\x00b", "a,b", "a//b", "a/ b", "x" * 151, "日" * 100,
    ],
)  # fmt: skip
def test_names_that_leave_the_folder_or_break_prompts_are_refused(webui, name):
    with pytest.raises(SpoError, match="LoRA name"):
        folders.lora_path(name)


def test_names_and_paths_go_both_ways(webui, tmp_path):
    for name in ("vivid", "mine/vivid", "deep/er/vivid 2", "Übung"):
        path = folders.lora_path(name)
        assert path.is_relative_to((tmp_path / "Lora").resolve())
        assert folders.lora_name(path) == name
    assert folders.lora_path("vivid.safetensors") == folders.lora_path("vivid")
    outside = tmp_path / "outside"
    outside.mkdir()
    (tmp_path / "Lora" / "link").symlink_to(outside)
    with pytest.raises(SpoError, match="leads out"):
        folders.lora_path("link/vivid")


def test_loras_are_found_as_the_webui_finds_them(webui, tmp_path):
    """Linked files and folders, and the LyCORIS folder of old."""
    lora, lycoris, elsewhere = tmp_path / "Lora", tmp_path / "LyCORIS", tmp_path / "elsewhere"
    webui.shared.cmd_opts.lyco_dir_backcompat = str(lycoris)
    for folder in (lora / "mine", lycoris, elsewhere):
        folder.mkdir(parents=True)
    for path in (lora / "mine" / "vivid", lycoris / "old", elsewhere / "far"):
        path.with_suffix(".safetensors").write_bytes(b"x")
    (lora / "linked").symlink_to(elsewhere)
    (lora / "alias.safetensors").symlink_to(elsewhere / "far.safetensors")
    assert sorted(folders.lora_files()) == ["LyCORIS/old", "alias", "linked/far", "mine/vivid"]
    assert folders.lora_names() == ["alias", "linked/far", "LyCORIS/old", "mine/vivid"]


def test_the_bundled_prompts_are_there():
    assert len(Path(folders.BUNDLED_PROMPTS).read_text("utf-8").splitlines()) > 50


def test_labelled_pairs_are_anywhere_for_their_owner_and_in_one_folder_for_others(webui, tmp_path, monkeypatch):
    place = folders.preference_folder() / "pairs"
    (place / "mine").mkdir(parents=True)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    assert folders.labelled_pairs("mine") == place / "mine"
    assert folders.labelled_pairs(str(elsewhere)) == elsewhere
    for other_machine in ("\\\\host\\share", "//host/share"):
        with pytest.raises(SpoError, match="on another machine"):
            folders.labelled_pairs(other_machine)
    for flag in ("listen", "share", "hide_ui_dir_config"):
        monkeypatch.setattr(webui.shared.cmd_opts, flag, True, raising=False)
        assert folders.labelled_pairs("mine") == place / "mine"
        for path in (str(elsewhere), "../../elsewhere", "mine/../../x", "C:\\pairs", "nothing"):
            with pytest.raises(SpoError, match="cannot be opened from here"):
                folders.labelled_pairs(path)
        monkeypatch.setattr(webui.shared.cmd_opts, flag, False)


@pytest.mark.parametrize("name", ["my-taste.v2", "Größe 3", "a_b"])
def test_names_that_every_system_takes(name):
    assert folders.plain_name(f" {name} ", "the name") == name


@pytest.mark.parametrize(
    "name", ["con", "NUL.txt", "com1 .x", "ends.", ".hidden", "a/b", "a\\b", "a:b", "", " ", "x" * 300]
)
def test_names_that_some_system_does_not_take(name):
    with pytest.raises(SpoError, match="the name is"):
        folders.plain_name(name, "the name")


def test_judges_of_pictures_are_the_demos_and_what_models_spo_holds(webui):
    assert folders.picture_judge_choices() == ["demo", "demo-judge", "demo-adherence"]
    assert folders.picture_judge_path(" demo-judge ") == "demo-judge" and folders.picture_judge_path("") == ""
    with pytest.raises(SpoError, match='no preference model "../mine.safetensors" in models/SPO'):
        folders.picture_judge_path("../mine.safetensors")


def test_a_judge_is_chosen_by_name_and_no_path_is_opened(webui):
    assert folders.stage_judge_choices()[:4] == ["auto", "none", "demo-judge", "demo-adherence"]
    assert [folders.stage_judge_path(name) for name in (" auto", "none", "demo-judge")] == [
        "auto",
        "none",
        "demo-judge",
    ]
    with pytest.raises(SpoError, match="no preference model"):
        folders.stage_judge_path("/etc/passwd")


@pytest.mark.parametrize(
    ("architecture", "file_name", "px"),
    [("sd15", "dream.safetensors", 512), ("sdxl", "xl.safetensors", 1024), ("sd15", folders.DEMO_CHECKPOINT, 64)],
)
def test_a_checkpoints_own_size(architecture, file_name, px):
    assert folders.usual_size_px(architecture, file_name) == px

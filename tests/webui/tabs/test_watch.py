"""What an open page is sent, over a stand-in for the WebUI: what it shows already is not sent again."""

from __future__ import annotations

import pytest

gr = pytest.importorskip("gradio")

from spo.webui.jobs import job  # noqa: E402
from spo.webui.tabs import watch  # noqa: E402
from tests.webui import stand_in  # noqa: E402

webui = stand_in.webui


@pytest.fixture
def looks(webui):
    with gr.Blocks():
        train = watch.build_area("spo", "pictures", "pool", "curves", "log")
        compare = watch.build_area("spo_compare", "pictures", "table", "log")
        seen, running, finished = gr.Textbox(), gr.Row(), gr.Row()
        return watch.Looks(seen, train, compare, running, finished, (gr.HTML(), gr.Button()))


def look(looks, seen):
    values = looks.look(seen)
    names = ["seen"]
    for area in looks.areas:
        names += [f"{area.name} {part}" for part in ("status", *area.parts, "box")]
    return dict(zip([*names, "running", "finished", "download", "stop"], values, strict=True))


def test_only_what_changed_is_sent(looks, tmp_path):
    idle = look(looks, "")
    assert "Nothing is going on" in idle["spo status"]
    assert [idle[name]["visible"] for name in ("running", "finished", "spo box")] == [False] * 3

    run = job.start("training", "vivid", lambda mine: mine.say("Begun."))
    job._thread.join(10)
    run.rows.append({"step": 1.0, "preference_mean": 2.0})
    run.output = tmp_path / "vivid.safetensors"
    first = look(looks, idle["seen"])
    assert "svg" in first["spo curves"] and "Begun." in first["spo log"]
    assert first["finished"]["visible"] and not first["running"]["visible"]
    again = look(looks, first["seen"])
    assert [again[name] for name in ("spo curves", "spo log", "spo pool")] == [gr.update()] * 3
    run.say("More.")
    later = look(looks, first["seen"])
    assert later["spo curves"] == gr.update() and "More." in later["spo log"]


def test_a_comparison_leaves_the_run_and_its_lora_where_they_were(looks, tmp_path):
    run = job.start("training", "vivid", lambda mine: mine.say("Begun."))
    job._thread.join(10)
    run.output = tmp_path / "vivid.safetensors"

    def compare(mine):
        mine.table = "base 1.0"

    job.start("comparison", "vivid", compare)
    job._thread.join(10)
    shown = look(looks, "")
    assert "Begun." in shown["spo log"] and "base 1.0" in shown["spo_compare table"]
    assert shown["finished"]["visible"]


def test_lists_are_read_anew_when_something_ended(webui):
    before = watch.lists_key()
    job.start("training", "vivid", lambda mine: None)
    job._thread.join(10)
    assert watch.lists_key() != before == before

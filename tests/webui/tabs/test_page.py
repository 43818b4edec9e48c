"""The status page: escaped, drawn, complete."""

from __future__ import annotations

import re
from urllib.parse import quote

import pytest
from PIL import Image

from spo.webui import folders, seam
from spo.webui.jobs.job import Example, Job, PoolPictures, StatisticsTable
from spo.webui.tabs import page
from tests.webui import stand_in

webui = stand_in.webui
pytestmark = pytest.mark.usefixtures("webui")


def test_a_part_is_made_once_and_anew_when_it_changes(monkeypatch, tmp_path):
    made = []
    monkeypatch.setattr(page, "uri", lambda picture: made.append(picture) or "data:")
    job = Job("training", "vivid", "task(spo once)")
    assert set(page.part_keys(job).values()) == {""} == set(page.part_keys(None).values())
    job.picture = tmp_path / "step1.png"
    Image.new("RGB", (8, 8)).save(job.picture)
    job.rows.append({"step": 1.0})
    job.say("Begun.")
    before = page.part_keys(job)
    for _ in range(3):
        assert 'class="spo-zoom"' in page.part("pictures", job, page.part_keys(job)["pictures"])
    assert len(made) == 1
    job.say("Going on.")
    job.picture = tmp_path / "step2.png"
    Image.new("RGB", (8, 8)).save(job.picture)
    after = page.part_keys(job)
    assert {name for name in after if after[name] != before[name]} == {"log", "pictures"}
    page.part("pictures", job, after["pictures"])
    assert len(made) == 2


def test_the_newest_samples_are_seen_below_those_from_before_training(tmp_path):
    job = Job("training", "vivid", "task(spo)", picture=tmp_path / "step2.png", first_samples=tmp_path / "step0.png")
    for path, colour in ((job.first_samples, "red"), (job.picture, "blue")):
        Image.new("RGB", (8, 8), colour).save(path)
    made = page.part("pictures", job, page.part_keys(job)["pictures"])
    assert made.count("<img") == 2 and made.index('alt="step0') < made.index('alt="step2')


def test_no_message_says_where_things_are_on_this_machine(tmp_path):
    job = Job("training", "vivid", "task(spo)", phase="failed")
    job.say(f'"{folders.preference_folder() / "x.bin"}" is damaged.')
    for text in (page.status(job), page.part("log", job, "once"), page.error(job.message), page.note(job.message)):
        assert str(tmp_path) not in text and "SPO/x.bin" in text


def test_the_lora_of_a_run_is_named_with_a_picture_to_make_of_it(tmp_path):
    example = Example(["a <fox>"], "bad", 64, 96, 12, 5.5, "demo")
    run = Job(
        "training", "vivid", "task(spo)", phase="finished", output=tmp_path / "vivid.safetensors", example=example
    )
    text = page.status(Job("comparison", "vivid", "task(spo 2)"), run, lists="x")
    for told in ('data-lora="vivid"', 'data-prompt="a &lt;fox&gt;"', 'data-height="96"', 'data-cfg="5.5"'):
        assert told in text
    assert 'data-kind="comparison"' in text
    assert "data-lora" not in page.status(run)


def status_of(**changes):
    made = Job("training", "<b>vivid</b>", "task(spo)")
    for name, value in changes.items():
        setattr(made, name, value)
    return page.status(made)


def test_the_status_escapes_names_and_messages():
    text = status_of(message="<script>alert(1)</script>", phase="failed")
    assert "<script>" not in text
    assert "<b>vivid" not in text.replace("<b>Failed", "")
    assert 'data-live="0"' in text
    assert "Nothing is going on" in page.status(None)
    assert 'data-phase="stopping"' in status_of(phase="working", stop_wanted="save")


def test_the_pool_marks_best_worst_and_parent():
    pool = PoolPictures([Image.new("RGB", (8, 8))] * 3, [1.0, 2.0, 0.5], 1, 2, 1, True, 4, 701, 'a "fox" <1>')
    job = Job("training", "vivid", "task(spo)", pool=pool)
    text = page.part("pool", job, page.part_keys(job)["pool"])
    assert re.findall(r'<figure class="([^"]*)"', text) == ["", "spo-best spo-goes-on", "spo-worst"]
    assert "Pool at step 5, timestep 701: kept as a pair" in text
    assert "a &quot;fox&quot; &lt;1&gt;" in text


def test_charts_draw_what_is_finite():
    drawn = page.chart("Score", [1.0, 2.0, 3.0], {"a": [1.0, float("nan"), 3.0]})
    points = re.search(r'points="([^"]*)"', drawn).group(1).split()
    assert len(points) == 2
    assert "from 1 to 3" in drawn
    assert "nan" not in drawn
    assert "polyline" in page.chart("Empty", [], {"a": []})
    assert "from 0 to 1" in page.chart("Share", [1.0], {"kept": [0.5]}, low=0, high=1)


def test_a_comparisons_page_is_a_link_where_the_webui_serves_it(webui, monkeypatch, tmp_path):
    done = Job("comparison", "vivid", "task", table="old <one>")
    assert page.part("table", done, "0") == '<div class="spo-table" tabindex="0"><pre>old &lt;one&gt;</pre></div>'
    done.statistics = StatisticsTable(["base", "vivid : 1"], [("Wins (<all>)", [("-", ""), ("75%", "50% to 90%")])])
    assert page.part("table", done, "1") == (
        '<div class="spo-table" tabindex="0"><table><thead><tr><th scope="col"></th><th scope="col">base</th>'
        '<th scope="col">vivid : 1</th></tr></thead><tbody><tr><th scope="row">Wins (&lt;all&gt;)</th><td>-</td>'
        "<td>75%<small>50% to 90%</small></td></tr></tbody></table></div>"
    )
    done.page = tmp_path / "out" / "spo a&b.html"
    text = page.part("table", done, "2")
    assert f'href="file={quote((tmp_path / "out").as_posix())}/spo%20a%26b.html"' in text
    assert "Open the page with all pictures" in text and "spo a&amp;b.html</p>" in text
    monkeypatch.setattr(seam.webui, "link_to", lambda file: "")
    assert "href" not in page.part("table", done, "3")


def test_curves_show_what_judges_of_stages_measured():
    rows, checks = [{"step": 5.0, "preference_mean": 1.0}], [{"step": 0.0, "judge": 1.0}, {"step": 5.0, "judge": 2.0}]
    assert "Held-out judge" not in page.curves(rows)
    shown = page.curves(rows, checks)
    assert "Held-out judge from 1 to 2" in shown
    assert "Adherence" not in shown

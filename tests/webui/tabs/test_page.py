"""The status page: escaped, drawn, complete."""

from __future__ import annotations

import re

from PIL import Image

from spo.webui.jobs.job import Job, PoolPictures
from spo.webui.tabs import page


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
    text = status_of(pool=pool, phase="working")
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

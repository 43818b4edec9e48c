"""What the extension gives the WebUI: all of it, and routes only where an API is wanted."""

from __future__ import annotations

import pytest

pytest.importorskip("gradio")
fastapi = pytest.importorskip("fastapi")

from spo.webui import register, seam, xyz  # noqa: E402
from spo.webui.jobs import fetching, job, voting  # noqa: E402
from spo.webui.tabs import tab  # noqa: E402
from tests.webui import stand_in  # noqa: E402

webui = stand_in.webui


@pytest.fixture
def given(webui, monkeypatch):
    """The arguments of `seam.webui.on_start`."""
    given = {}
    monkeypatch.setattr(seam.webui, "on_start", lambda **parts: given.update(parts))
    register.register()
    return given


def test_the_tab_the_axes_and_the_end_of_our_threads(given):
    assert given["before_page"] is xyz.add_axes and given["tabs"] is tab.tabs
    assert set(given["ends"]) == {job.end, fetching.end, voting.end}


@pytest.mark.parametrize(("flags", "wanted"), [((True, False), True), ((False, True), True), ((False, False), False)])
def test_routes_come_where_an_api_is_wanted(given, webui, flags, wanted):
    webui.shared.cmd_opts.api, webui.shared.cmd_opts.nowebui = flags
    app = fastapi.FastAPI()
    given["app"](app)
    paths = {getattr(route, "path", "") for route in app.routes}
    assert ("/spo/v1/start" in paths) == wanted == ("/spo/v1/status" in paths)

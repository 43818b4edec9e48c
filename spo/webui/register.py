"""Everything the extension tells the WebUI about itself. Called at its start and at every Reload UI."""

from __future__ import annotations

from typing import Any

from spo.webui import xyz
from spo.webui.api import routes
from spo.webui.jobs import fetching, job, voting
from spo.webui.seam import webui
from spo.webui.tabs import tab


def register() -> None:
    """Tab, axes, routes; and the end of our threads before a reload."""

    webui.on_start(before_page=xyz.add_axes, tabs=tab.tabs, app=_add_routes, ends=(job.end, fetching.end, voting.end))


def _add_routes(app: Any) -> None:

    if webui.api_wanted():
        routes.add_routes(app)

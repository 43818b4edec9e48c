"""Everything the extension tells the WebUI about itself. Called at its start and at every Reload UI."""

from __future__ import annotations

from typing import Any


def register() -> None:
    """Sampler, tab, axes, routes; and the end of our thread before a reload."""
    from modules import script_callbacks

    from spo.webui import sampler, xyz
    from spo.webui.jobs import job, voting
    from spo.webui.tabs import tab

    sampler.register()
    script_callbacks.on_before_ui(xyz.add_axes)
    script_callbacks.on_ui_tabs(tab.tabs)
    script_callbacks.on_app_started(_routes)
    for end in (job.end, voting.end):
        script_callbacks.on_before_reload(end)
        script_callbacks.on_script_unloaded(end)


def _routes(demo: Any, app: Any) -> None:
    from modules import shared

    from spo.webui.api import routes

    if shared.cmd_opts.api or shared.cmd_opts.nowebui:
        routes.add_routes(app)

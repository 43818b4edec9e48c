"""The WebUI's start and its page."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

from spo.webui.a1111.queue import TURNS, TURNS_TEXT


def on_start(
    *,
    before_page: Callable[[], None],
    tabs: Callable[[], list[tuple[Any, str, str]]],
    app: Callable[[Any], None],
    ends: Iterable[Callable[[], None]],
) -> None:
    """Have the WebUI call these, at its start and again after each Reload UI; this is said again then.

    before_page  before the page is built; tabs: [(gradio Blocks, title, id)]
    app          with the FastAPI application, a new one after each reload
    ends         before a reload, and when the extension's scripts are unloaded
    """
    from modules import script_callbacks

    script_callbacks.on_ui_settings(_add_settings)
    script_callbacks.on_before_ui(before_page)
    script_callbacks.on_ui_tabs(tabs)
    script_callbacks.on_app_started(lambda demo, application: app(application))
    for end in ends:
        script_callbacks.on_before_reload(end)
        script_callbacks.on_script_unloaded(end)


def _add_settings() -> None:
    from modules import shared

    shared.opts.add_option(TURNS, shared.OptionInfo(True, TURNS_TEXT, section=("spo", "SPO")))


def refresh_button(fields: Any, choices: Callable[[], list[str]], elem_id: str) -> None:
    """The WebUI's small refresh button beside a dropdown."""
    from modules.ui_common import create_refresh_button

    create_refresh_button(fields, lambda: None, lambda: {"choices": choices()}, elem_id)


def xyz_plots() -> list[ModuleType]:
    """The X/Y/Z plot's module, as the WebUI has loaded it; it has `axis_options` and `AxisOption`."""
    from modules import scripts

    names = ("xyz_grid.py", "scripts.xyz_grid")
    return [data.module for data in scripts.scripts_data if data.module.__name__ in names]

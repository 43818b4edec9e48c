"""Which WebUI this runs in: `webui` is the module that speaks to it.

    from spo.webui.seam import webui
    webui.loaded_checkpoint()

Each kind of WebUI has a folder beside with the same names (`a1111`'s `__init__` lists them); nothing else in `spo`
knows where it runs. Outside every WebUI it is A1111's, whose folder imports where there is none.
"""

from __future__ import annotations

from spo.webui import a1111 as webui

__all__ = ["webui"]

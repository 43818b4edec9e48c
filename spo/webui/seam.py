"""Which WebUI this runs in: `webui` is the module that speaks to it.

    from spo.webui.seam import webui
    webui.loaded_checkpoint()

Each kind of WebUI has a folder beside with the same names (`a1111`'s `__init__` lists them); nothing else in `spo`
knows where it runs. Outside every WebUI it is A1111's, whose folder imports where there is none.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING or find_spec("modules_forge") is None:
    from spo.webui import a1111 as webui
elif find_spec("ldm_patched") is not None:  # reForge, and Forge classic
    from spo.webui import reforge as webui
elif find_spec("backend") is not None:  # Forge, and Forge Classic's branch neo
    from spo.webui import forge as webui
else:
    from spo.webui import a1111 as webui

__all__ = ["webui"]

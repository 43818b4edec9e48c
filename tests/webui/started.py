"""A real WebUI's modules in this process, as its own start loads them, on the CPU and without its server.

`SPO_WEBUI_DIR` names its folder: AUTOMATIC1111's, or a fork's. Forks refuse the tiny checkpoints, whose widths no real
one has; they get those of `fork_checkpoints`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.webui import fork_checkpoints

FOLDER = os.environ.get("SPO_WEBUI_DIR")
IS_FORK = bool(FOLDER) and (Path(str(FOLDER)) / "modules_forge").is_dir()
IS_FORGE = IS_FORK and not (Path(str(FOLDER)) / "ldm_patched").is_dir()  # with the package `backend`; Forge's, neo's
IS_NEO = IS_FORGE and "--always-cpu" not in (Path(str(FOLDER)) / "backend" / "args.py").read_text()
SD15, SDXL = ("spo-test-sd15", "spo-test-sdxl") if IS_FORK else ("tiny-sd1", "tiny-sdxl")
SIZE = 64 if IS_FORK else 128  # of test pictures; a fork's VAE is of full size, and slow on a CPU

FLAGS = ["--skip-prepare-environment", "--skip-torch-cuda-test", "--no-hashing", "--nowebui"]
OF_A1111 = ["--do-not-download-clip", "--use-cpu", "all", "--no-half", "--precision", "full", "--disable-nan-check"]
OF_FORKS = ["--always-cpu", "--skip-version-check", "--disable-nan-check"]
OF_NEO = ["--cpu", "--skip-version-check"]


def find() -> None:
    """Put the WebUI's folder among those that Python imports from, so that the seam sees which one it is."""
    if FOLDER and FOLDER not in sys.path:
        sys.path.insert(0, FOLDER)


@contextmanager
def started() -> Iterator[None]:
    """The working folder and the command line are the WebUI's inside; its modules are loaded once in a process."""
    assert FOLDER
    former = os.getcwd(), list(sys.argv)
    os.chdir(FOLDER)
    find()
    sys.argv = ["launch.py", *FLAGS, *(OF_NEO if IS_NEO else OF_FORKS if IS_FORK else OF_A1111)]
    try:
        if "modules.initialize" not in sys.modules:
            _start()
        yield
    finally:
        os.chdir(former[0])
        sys.argv = former[1]


def without_scripts(p: Any) -> None:
    """Ready the processing of a picture that no scripts take part in: reForge looks for one of its own among them."""
    if IS_FORK:
        from modules import scripts

        p.scripts, p.script_args = scripts.ScriptRunner(), []


def _start() -> None:
    if IS_FORK:
        fork_checkpoints.write_missing(Path(str(FOLDER)) / "models" / "Stable-diffusion")
        from modules_forge.initialization import initialize_forge

        initialize_forge()
    from modules import initialize

    initialize.imports()
    initialize.check_versions()
    initialize.initialize()
    from modules import script_callbacks

    script_callbacks.before_ui_callback()
    if IS_FORK:
        fork_checkpoints.few_blocks()

"""The rooms of the house: what may import what, and what may be imported without heavy libraries."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SPO = Path(__file__).parent.parent / "spo"
MODULES = {
    ".".join(path.relative_to(SPO.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in SPO.rglob("*.py")
}
TORCH_ONLY = {"spo.algorithm.diffusion", "spo.algorithm.pairs", "spo.algorithm.objective"}
WEBUI_BRINGS = {"modules", "launch", "ldm", "sgm", "k_diffusion", "networks"}  # the seam's: spo/webui/a1111.py
WEBUI_ONLY = {*WEBUI_BRINGS, "gradio", "fastapi", "starlette", "pydantic"}


def imports(path: Path, *, everywhere: bool = True) -> set[str]:
    """Names of imported modules; only those of the module's top level when not everywhere."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = set()
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
    return found


def test_the_mathematics_knows_nothing_but_torch():
    for name in TORCH_ONLY:
        foreign = {module for module in imports(MODULES[name]) if module.startswith("spo.")}
        assert foreign <= TORCH_ONLY | {"spo.errors"}, name


@pytest.mark.parametrize("name", sorted(MODULES))
def test_only_the_webui_room_imports_the_webui(name):
    tops = {module.split(".")[0] for module in imports(MODULES[name])}
    assert name.startswith("spo.webui") or not tops & WEBUI_ONLY


@pytest.mark.parametrize("name", sorted(MODULES))
def test_one_file_alone_imports_what_the_webui_brings(name):
    tops = {module.split(".")[0] for module in imports(MODULES[name])}
    assert name == "spo.webui.a1111" or not tops & WEBUI_BRINGS


def test_rooms_depend_downwards_only(monkeypatch):
    linter = pytest.importorskip("importlinter.cli")
    monkeypatch.chdir(SPO.parent)
    assert linter.lint_imports(config_filename="pyproject.toml", no_cache=True) == 0


def test_the_engine_imports_where_the_webui_and_diffusers_do_not_exist():
    engine = [
        "spo",
        "spo.algorithm.rollout",
        "spo.training.loop",
        "spo.lora.write",
        "spo.lora.describe",
        "spo.report.win_rate",
        "spo.report.tables",
        "spo.report.grids",
        "spo.report.curves",
        "spo.config",
        "spo.headless.host",
        "spo.preference.load",
        "spo.training.clip",
        "spo.preference.download",
        "spo.cli.main",
    ]
    blocked = ["modules", "gradio", "fastapi", "diffusers", "peft", "transformers", "matplotlib", "PIL"]
    code = (
        f"import sys\nfor name in {blocked}: sys.modules[name] = None\n"
        f"import importlib\nfor name in {engine}: importlib.import_module(name)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=SPO.parent)

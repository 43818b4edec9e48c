"""The rooms of the house: what may import what, where heavy libraries are imported, and that every module has tests."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for room in ("spo", "recipes")
    for path in (ROOT / room).rglob("*.py")
}
OURS = {name: path for name, path in MODULES.items() if name.startswith("spo")}
TORCH_ONLY = {"spo.algorithm.diffusion", "spo.algorithm.pairs", "spo.algorithm.objective"}
FORGE_ONLY = {"backend", "modules_forge", "ldm_patched"}
WEBUI_ONLY = {"modules", "gradio", "fastapi", "starlette", "ldm", "sgm", "k_diffusion"} | FORGE_ONLY

# packages that may be imported inside functions, and why
IMPORTED_LATE = {
    "torch": "seconds to import; what needs no tensors works without it",
    "numpy": "comes with torch",
    "safetensors": "reads tensors, comes with torch",
    "diffusers": "seconds to import, and not at hand everywhere: the WebUI may lack it",
    "peft": "the same",
    "transformers": "seconds to import",
    "huggingface_hub": "for downloads only",
    "matplotlib": "seconds to import, for pictures only",
    "PIL": "for pictures only",
    "pyarrow": "optional: pairs from parquet files",
    "yaml": "for .yaml files only",
    "bitsandbytes": "optional: 8-bit AdamW",
    "tensorboard": "optional",
    "accelerate": "for several processes only",
    "psutil": "comes with accelerate",
    "lpips": "optional: a distance between pictures",
    "modules": "the WebUI, which is there only inside it",
    "k_diffusion": "the same",
    "ldm": "the same",
    "sgm": "the same",
    "backend": "of Forge: the same",
    "modules_forge": "the same",
    "ldm_patched": "of reForge: the same",
    "gradio": "the same",
    "fastapi": "the same",
    "starlette": "the same",
}

# modules without a test file of their own, and where they are tried instead
UNTESTED_ALONE = {
    "spo.__main__": "tests/cli/test_train.py starts it",
}
# each one's files are one surface, tried as one in a real WebUI by tests/webui/test_a1111.py and others
SEAM = ("spo.webui.a1111.", "spo.webui.forge.", "spo.webui.reforge.")


def imports(path: Path, *, everywhere: bool = True) -> set[str]:
    """Names of imported modules; only those of the module's top level when not everywhere."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {name for node in (ast.walk(tree) if everywhere else tree.body) for name in imported_by(node)}


def imported_by(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        module = node.module or ""
        yield module
        yield from (name for alias in node.names if (name := f"{module}.{alias.name}") in MODULES)


def late_imports(path: Path) -> set[str]:
    """Names of modules that are imported inside functions."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    return {name for function in functions for node in ast.walk(function) for name in imported_by(node)}


def test_the_mathematics_knows_nothing_but_torch():
    for name in TORCH_ONLY:
        foreign = {module for module in imports(MODULES[name]) if module.startswith("spo.")}
        assert foreign <= TORCH_ONLY | {"spo.errors"}, name


@pytest.mark.parametrize("name", sorted(MODULES))
def test_only_the_webui_room_imports_the_webui(name):
    tops = {module.split(".")[0] for module in imports(MODULES[name])}
    assert name.startswith("spo.webui") or not tops & WEBUI_ONLY
    assert name.startswith(SEAM) or not tops & (WEBUI_ONLY - {"gradio", "fastapi", "starlette"})


@pytest.mark.parametrize("name", sorted(MODULES))
def test_functions_import_heavy_and_optional_packages_only(name):
    """Nothing of ours, so that no cycle hides in a function."""
    tops = {module.split(".")[0] for module in late_imports(MODULES[name])}
    assert tops - sys.stdlib_module_names <= set(IMPORTED_LATE)
    assert not tops & sys.stdlib_module_names


def test_no_module_imports_itself_by_way_of_others():
    """At the top level, those for type checkers left out."""
    imported = {name: imports(path, everywhere=False) & set(MODULES) - {name} for name, path in MODULES.items()}
    while leaves := {name for name, others in imported.items() if not others & set(imported)}:
        imported = {name: others for name, others in imported.items() if name not in leaves}
    assert not imported, f"cycles among {sorted(imported)}"


def test_rooms_depend_downwards_only(monkeypatch):
    linter = pytest.importorskip("importlinter.cli")
    monkeypatch.chdir(ROOT)
    assert linter.lint_imports(config_filename="pyproject.toml", no_cache=True) == 0


def test_all_but_the_webui_room_imports_where_the_webui_and_diffusers_do_not_exist():
    engine = sorted(name for name in OURS if not name.startswith("spo.webui") and name != "spo.__main__")
    blocked = ["modules", "gradio", "fastapi", "diffusers", "peft", "transformers", "matplotlib", "PIL"]
    code = (
        f"import sys\nfor name in {blocked}: sys.modules[name] = None\n"
        f"import importlib\nfor name in {engine}: importlib.import_module(name)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_every_module_has_a_test_file_of_its_name():
    """spo/lora/read.py -> tests/lora/test_read.py."""
    untested = set()
    for name, path in OURS.items():
        if path.name == "__init__.py":
            continue
        mirror = ROOT / "tests" / path.relative_to(ROOT / "spo").with_name(f"test_{path.name}")
        if not mirror.exists() and not name.startswith(SEAM):
            untested.add(name)
    assert untested == set(UNTESTED_ALONE)

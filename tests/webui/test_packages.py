"""What is missing beside which versions, and what the user is told. The version tables are made up here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from spo.webui.packages import installed_versions, missing, missing_text
from tests.test_architecture import MODULES, WEBUI_ONLY, imports

WEBUI = {"transformers": "4.30.2", "accelerate": "0.21.0", "huggingface-hub": "0.36.2"}
READY = {**WEBUI, "peft": "0.13.2", "diffusers": "0.30.3"}


def requirements(versions):
    return [(item.requirement, item.may_install) for item in missing(versions)]


def test_a_fresh_webui_lacks_two_packages():
    assert requirements(WEBUI) == [("peft==0.13.2", True), ("diffusers==0.30.3", True)]


@pytest.mark.parametrize(("peft", "diffusers"), [("0.13.2", "0.30.3"), ("0.10.0", "0.29.2"), ("0.12.0+local", "0.30")])
def test_accepted_versions_are_enough(peft, diffusers):
    assert missing({**WEBUI, "peft": peft, "diffusers": diffusers}) == []


@pytest.mark.parametrize("version", ["0.9.0", "0.14.0", "0.13.3.dev0", "1.0"])
def test_another_extensions_version_is_never_replaced(version):
    (item,) = missing({**READY, "peft": version})
    assert (item.installed, item.may_install) == (version, False)
    text = missing_text([item])
    assert f"peft 0.10 to 0.13.2, but {version} is installed" in text and "left alone" in text


def test_a_newer_webui_keeps_what_it_has_and_gets_what_it_lacks():
    newer = {"transformers": "4.46.1", "accelerate": "0.31.0", "huggingface-hub": "0.26.2", "diffusers": "0.31.0"}
    assert requirements(newer) == [("peft==0.13.2", True)]
    assert missing({**newer, "peft": "0.21.2"}) == []


FORKS = {  # what their requirements pin
    "Forge": ({"transformers": "4.46.1", "accelerate": "0.31.0", "huggingface-hub": "0.26.2", "diffusers": "0.31.0",
               "peft": "0.13.2"}, []),
    "neo": ({"transformers": "4.56.2", "accelerate": "1.13.0", "huggingface-hub": "0.36.2", "diffusers": "0.37.1",
             "peft": "0.17.1"}, []),
    "reForge": ({"transformers": "4.48.1", "accelerate": "0.21.0", "huggingface-hub": "0.25.0", "diffusers": "0.32.2"},
                [("peft==0.13.2", True)]),
    "classic": ({"transformers": "4.30.2", "accelerate": "0.21.0", "huggingface-hub": "0.26.5", "diffusers": "0.31.0"},
                [("peft==0.13.2", True)]),
}  # fmt: skip


@pytest.mark.parametrize("fork", FORKS)
def test_nothing_that_a_fork_pins_is_moved_or_complained_of(fork):
    pinned, added = FORKS[fork]
    assert requirements(pinned) == added


def test_what_is_no_version_is_left_alone():
    (item,) = missing({**READY, "peft": "from-source"})
    assert (item.installed, item.may_install) == ("from-source", False)


@pytest.mark.parametrize(("hub", "may_install"), [("", True), ("0.22.1", True), ("1.0.0", False)])
def test_the_hub_is_only_ever_raised(hub, may_install):
    versions = {**READY, "huggingface-hub": hub}
    assert requirements(versions) == [("huggingface-hub>=0.23.2,<1.0", may_install)]
    assert missing({**READY, "huggingface-hub": "0.23.2"}) == []


def test_what_the_user_is_told():
    told = missing_text(missing(WEBUI), reason="no disk")
    assert told.startswith(
        "SPO needs peft 0.10 to 0.13.2 (missing) and diffusers 0.29.2 to 0.31.0 (missing), and could"
    )
    assert "(no disk)" in told and "\n" not in told
    assert f'"{sys.executable}" -m pip install --no-deps "peft==0.13.2" "diffusers==0.30.3"' in told
    assert missing_text([]) == ""


def test_the_versions_on_disk_are_found(tmp_path, monkeypatch):
    folder = tmp_path / "peft-9.8.7.dist-info"
    folder.mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert "peft" not in installed_versions()  # an interrupted installation: a folder and nothing in it
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: peft\nVersion: 9.8.7\n")
    assert installed_versions() == {"peft": "9.8.7"}


def test_it_needs_the_standard_library_and_packaging_only():
    code = (
        "import sys; before = set(sys.modules); import spo.webui.packages\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "assert not new - {*sys.stdlib_module_names, 'spo', 'packaging'}, new"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_the_webui_brings_everything_else_that_is_imported():
    # in the list of packages of a clean WebUI 1.10.1
    brought = {"torch", "numpy", "PIL", "safetensors", "transformers", "matplotlib", "tqdm", "yaml", "open_clip"}
    brought |= {"packaging", "pydantic", "huggingface_hub", "accelerate", "psutil"}
    optional = {"bitsandbytes", "lpips", "pyarrow"}
    known = {*sys.stdlib_module_names, "spo", *brought, *optional, *WEBUI_ONLY, "peft", "diffusers"}
    for name in (name for name in MODULES if name.split(".")[0] == "spo"):
        tops = {module.split(".")[0] for module in imports(MODULES[name])}
        assert tops <= known, name

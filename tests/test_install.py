"""install.py as the WebUI runs it: in a process of its own, with a `launch` whose pip is made up here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import packaging
import pytest

PACKAGING = Path(packaging.__file__).parent
INSTALL = Path(__file__).parent.parent / "install.py"
LAUNCH = '''
import os, re
from pathlib import Path

def run_pip(command, desc=None, live=False):
    """As the WebUI's: says what it does, raises RuntimeError with pip's output; here it adds an empty package."""
    print(f"Installing {desc}")
    print("pip", command)
    if os.environ.get("FAKE_PIP") == "skip":
        return
    if os.environ.get("FAKE_PIP") == "fails":
        raise RuntimeError("Couldn't install.\\nstderr: WARNING: Retrying\\nERROR: No matching distribution found\\n")
    name, version = re.search(r'"([a-z-]+)[>=]=([0-9.]+)', command).groups()
    add(name, version)

def add(name, version):
    folder = Path(__file__).parent / f"{name.replace('-', '_')}-{version}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\\nName: {name}\\nVersion: {version}\\n")
'''
WEBUI = {"transformers": "4.30.2", "accelerate": "0.21.0", "huggingface-hub": "0.36.2"}


@pytest.fixture
def start(tmp_path):
    """`start(pip="works", **more versions)` -> install.py's output lines, in a Python that has only these packages."""
    (tmp_path / "launch.py").write_text(LAUNCH)
    (tmp_path / "packaging").symlink_to(PACKAGING)  # in the WebUI's Python; its launcher imports it before us

    def run(pip="works", **versions):
        for name, version in {**WEBUI, **versions}.items():
            folder = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
            folder.mkdir(exist_ok=True)
            (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        surroundings = {**os.environ, "PYTHONPATH": str(tmp_path), "FAKE_PIP": pip}
        # -S: without the site-packages of the Python that runs the tests
        command = [sys.executable, "-S", str(INSTALL)]
        done = subprocess.run(command, env=surroundings, capture_output=True, text=True, cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout.splitlines()

    return run


FLAGS = "--no-deps --disable-pip-version-check --retries 1"


def test_a_fresh_webui_gets_two_packages_once(start):
    assert start() == [
        "Installing peft==0.13.2 for SPO",
        f'pip install {FLAGS} "peft==0.13.2"',
        "Installing diffusers==0.30.3 for SPO",
        f'pip install {FLAGS} "diffusers==0.30.3"',
    ]
    assert start() == []


def test_what_another_extension_brought_is_used(start):
    assert start(peft="0.11.1", diffusers="0.29.2") == []


def test_what_does_not_fit_is_left_alone_and_said(start):
    (line,) = start(peft="0.13.2", diffusers="0.25.0")
    assert line.startswith("SPO needs diffusers 0.29.2 to 0.31.0, but 0.25.0 is installed") and "left alone" in line


def test_without_a_network_one_sentence_is_said_and_pip_asked_once(start):
    lines = start(pip="fails")
    assert len(lines) == 3 and lines[0] == "Installing peft==0.13.2 for SPO"
    assert "could not be installed (No matching distribution found)" in lines[2]
    assert '"peft==0.13.2" "diffusers==0.30.3"' in lines[2]


def test_with_skip_install_it_says_what_is_missing(start):
    assert "restart the WebUI with a network connection, or run" in start(pip="skip")[-1]


def test_outside_the_webui_it_says_so(tmp_path):
    (tmp_path / "packaging").symlink_to(PACKAGING)
    command = [sys.executable, "-S", str(INSTALL)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("install.py is run by the WebUI when it starts") and done.stderr.count("\n") == 1

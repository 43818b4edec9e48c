"""Which Python packages the WebUI lacks for SPO, at which versions, and what to tell the user. Standard library only.

`install.py` asks before the WebUI's libraries are loaded, the tab asks to say what is missing. WebUI 1.10.1 brings all
but two of the packages that SPO imports; the two are installed without their dependencies, so that nothing moves.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Missing:
    """A package that is absent, or there at a version that is not known to work in this WebUI.

    package      its name in the registry
    requirement  what pip is to install, for example "peft==0.13.2"
    accepted     the versions that work, in words
    installed    the version that is there; "" when none is
    may_install  whether it may be installed unasked; another extension's version never is replaced
    """

    package: str
    requirement: str
    accepted: str
    installed: str
    may_install: bool


@dataclass(frozen=True)
class _Wanted:
    """A package with its accepted versions, both ends included; "0" as the last one includes every 0.x."""

    package: str
    first: str
    last: str
    accepted: str
    requirement: str
    may_update: bool = False


WANTED = (
    _Wanted("huggingface-hub", "0.23.2", "0", "0.23.2 or newer, below 1.0", "huggingface-hub>=0.23.2,<1.0", True),
    _Wanted("peft", "0.10", "0.13.2", "0.10 to 0.13.2", "peft==0.13.2"),
    _Wanted("diffusers", "0.29.2", "0.30.3", "0.29.2 to 0.30.3", "diffusers==0.30.3"),
)
# the versions above were tried beside these, which WebUI 1.10.1 pins; beside others an installed package is left alone
PINNED = {"transformers": "4.30", "accelerate": "0.21"}
PIP_FLAGS = "--no-deps"


def installed_versions() -> dict[str, str]:
    """The versions of the packages that matter here, as they are on disk now; absent ones are not in it."""
    importlib.invalidate_caches()
    found = {}
    for package in (*(wanted.package for wanted in WANTED), *PINNED):
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
        if version:  # None when an interrupted installation left an empty folder
            found[package] = version
    return found


def missing(versions: Mapping[str, str] | None = None) -> list[Missing]:
    """What SPO needs and this Python lacks, in the order of installation; empty: everything is there.

    versions  by package; default: `installed_versions()`
    """
    versions = installed_versions() if versions is None else versions
    as_pinned = all(_numbers(versions.get(name, ""))[:2] == _numbers(pin) for name, pin in PINNED.items())
    found = []
    for wanted in WANTED:
        installed = versions.get(wanted.package, "")
        too_old = _numbers(installed) < _numbers(wanted.first)
        too_new = _numbers(installed)[: len(_numbers(wanted.last))] > _numbers(wanted.last)
        if not installed or (as_pinned and (too_old or too_new)):
            may_install = not installed or (wanted.may_update and too_old)
            found.append(Missing(wanted.package, wanted.requirement, wanted.accepted, installed, may_install))
    return found


def missing_text(lacking: Sequence[Missing], *, reason: str = "") -> str:
    """What is missing and how to get it, in one sentence, and one for each package left alone; "" for nothing.

    reason  why it could not be installed, where that is known
    """
    wanted = [item for item in lacking if item.may_install]
    sentences = [_left_alone(item) for item in lacking if not item.may_install]
    if wanted:
        failed = f", and could not be installed ({reason})" if reason else ""
        names = " and ".join(f"{item.package} {item.accepted} ({_state(item)})" for item in wanted)
        command = pip_command(wanted)
        sentences.insert(
            0, f"SPO needs {names}{failed}; restart the WebUI with a network connection, or run {command} and restart."
        )
    return "\n".join(sentences)


def pip_command(lacking: Sequence[Missing]) -> str:
    """The command that installs the packages into the Python that is running."""
    requirements = " ".join(f'"{item.requirement}"' for item in lacking)
    return f'"{sys.executable}" -m pip install {PIP_FLAGS} {requirements}'


def _state(item: Missing) -> str:
    return f"{item.installed} is installed" if item.installed else "missing"


def _left_alone(item: Missing) -> str:
    return (
        f"SPO needs {item.package} {item.accepted}, but {item.installed} is installed, perhaps by another extension, "
        f"and was left alone; to change it, run {pip_command([item])} and restart."
    )


def _numbers(version: str) -> tuple[int, ...]:
    """(0, 13, 2) of "0.13.2", "0.13.2.dev0" and "0.13.2+cpu"; () of ""."""
    release = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in release[0].split(".")) if release else ()

"""Which Python packages the WebUI lacks for SPO, at which versions, and what to tell the user.

`install.py` asks before the WebUI's libraries are loaded, so this needs the standard library and `packaging` only,
which the WebUI's launcher itself needs by then; the tab asks to say what is missing. WebUI 1.10.1 brings all
but two of the packages that SPO imports; the two are installed without their dependencies, so that nothing moves. Of
the forks, Forge and neo bring both, reForge and classic diffusers; what they pin is left alone as well.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version


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
    """A package with the versions that work, in words too, and what pip is to install.

    may_update  a version that is older than these may be raised unasked
    """

    package: str
    works: SpecifierSet
    accepted: str
    requirement: str
    may_update: bool = False


WANTED = (
    _Wanted(
        "huggingface-hub",
        SpecifierSet(">=0.23.2,<1.0"),
        "0.23.2 or newer, below 1.0",
        "huggingface-hub>=0.23.2,<1.0",
        may_update=True,
    ),
    _Wanted("peft", SpecifierSet(">=0.10,<=0.13.2"), "0.10 to 0.13.2", "peft==0.13.2"),
    _Wanted("diffusers", SpecifierSet(">=0.29.2,<=0.31.0"), "0.29.2 to 0.31.0", "diffusers==0.30.3"),
)
# the versions above were tried beside these, which WebUI 1.10.1 pins; beside others an installed package is left alone
PINNED = {"transformers": SpecifierSet("==4.30.*"), "accelerate": SpecifierSet("==0.21.*")}
PIP_FLAGS = "--no-deps"


def installed_versions() -> dict[str, str]:
    """The versions of the packages that matter here, as they are on disk now; absent ones are not in it."""
    importlib.invalidate_caches()
    versions = {}
    for package in (*(wanted.package for wanted in WANTED), *PINNED):
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
        if version:  # None when an interrupted installation left an empty folder
            versions[package] = version
    return versions


def missing(versions: Mapping[str, str] | None = None) -> list[Missing]:
    """What SPO needs and this Python lacks, in the order of installation; empty: everything is there.

    versions  by package; default: `installed_versions()`
    """
    versions = installed_versions() if versions is None else versions
    as_pinned = all(_fits(versions.get(name, ""), pin) for name, pin in PINNED.items())
    lacking = []
    for wanted in WANTED:
        installed = versions.get(wanted.package, "")
        if not installed or (as_pinned and not _fits(installed, wanted.works)):
            may_install = not installed or (wanted.may_update and _is_older(installed, wanted.works))
            lacking.append(Missing(wanted.package, wanted.requirement, wanted.accepted, installed, may_install))
    return lacking


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


def _fits(version: str, works: SpecifierSet) -> bool:
    """Whether a version, "" for none, is among these; pre-releases count, text that is no version does not."""
    try:
        return bool(version) and works.contains(Version(version), prereleases=True)
    except InvalidVersion:
        return False


def _is_older(version: str, works: SpecifierSet) -> bool:
    lowest = min(Version(one.version) for one in works if one.operator == ">=")
    try:
        return Version(version) < lowest
    except InvalidVersion:
        return False

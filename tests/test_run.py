"""run.py: what it hands on to whom."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest

import run
from spo.cli.main import parser

PYTHON = Path("venv/bin/python")
TWO_PROCESSES = ["-n", "2", "--dist", "worksteal"]


@pytest.fixture
def calls(monkeypatch):
    """The commands that would be run; the environment is there already."""
    made: list[list[str]] = []
    monkeypatch.setattr(run, "_environment", lambda with_tests: PYTHON)
    monkeypatch.setattr(run, "_run", lambda program, *rest, folder=None: made.append([str(program), *rest]) or 0)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return made


def called_with(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["run.py", *arguments])
    return run.main()


@pytest.mark.parametrize("given", [[], ["-k", "loss"], ["tests/report", "-x"]])
def test_tests_run_in_two_processes(calls, monkeypatch, given):
    assert called_with(monkeypatch, "test", *given) == 0
    assert calls == [[str(PYTHON), "-m", "pytest", *TWO_PROCESSES, *given]]


@pytest.mark.parametrize("given", [["-n", "8"], ["-n0"], ["--numprocesses=4"], ["--pdb"], ["-p", "no:xdist"]])
def test_unless_the_user_says_in_how_many(calls, monkeypatch, given):
    assert called_with(monkeypatch, "test", *given) == 0
    assert calls == [[str(PYTHON), "-m", "pytest", *given]]


def test_the_check_is_ruff_mypy_and_the_layers(calls, monkeypatch):
    assert called_with(monkeypatch, "check") == 0
    assert [call[-1] for call in calls] == ["check", "--check", "mypy", str(PYTHON.with_name("lint-imports"))]


def test_all_else_is_the_programs(calls, monkeypatch):
    assert called_with(monkeypatch, "train", "--rank", "4") == 0
    assert calls == [[str(PYTHON), "-m", "spo", "train", "--rank", "4"]]
    commands = next(action for action in parser()._actions if isinstance(action, argparse._SubParsersAction))
    assert {*commands.choices, "test", "check"} == set(run.COMMANDS)


@pytest.mark.parametrize("given", [[], ["dance"]])
def test_an_unknown_command_gets_the_usage(calls, monkeypatch, capsys, given):
    assert called_with(monkeypatch, *given) == 2
    assert capsys.readouterr().err.startswith("usage: python run.py {demo,test,check,")
    assert calls == []

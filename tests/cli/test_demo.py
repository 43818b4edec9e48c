"""`spo demo`: its flags."""

from __future__ import annotations

from pathlib import Path

from spo.cli import demo
from spo.cli.main import main


def test_it_runs_in_the_folder_for_so_many_steps(monkeypatch):
    calls = []
    monkeypatch.setattr(demo, "run_demo", lambda folder, watched, steps: calls.append((folder, steps)) or 0)
    assert main(["demo"]) == 0
    assert main(["demo", "--folder", "elsewhere", "--steps", "3"]) == 0
    assert calls == [(Path("demo_run"), 0), (Path("elsewhere"), 3)]

"""`--gpus N`: refused where there are not so many, and, on processors, runs that end, are stopped, and are killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from spo.cli.main import main
from spo.lora.read import read_lora
from spo.runs.layout import RunFiles
from tests.tiny_files import training_flags

ROOT = Path(__file__).parents[2]
several = pytest.mark.skipif(
    os.name == "nt" or (os.cpu_count() or 1) < 2, reason="needs two cores, and signals that are POSIX's"
)


@pytest.mark.parametrize("count", ["0", "-1", "4097"])
def test_a_number_of_cards_that_is_not_there_is_refused(tiny_files, tmp_path, capsys, monkeypatch, count):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert main(["train", *training_flags(tiny_files, tmp_path / "a.safetensors", "--gpus", count)]) == 2
    said = capsys.readouterr().err
    assert f"--gpus is {count}" in said
    assert "this machine has 2 cores" in said and "accepted is 1 to 2" in said


def test_cards_are_counted_where_there_are_some(tiny_files, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    flags = training_flags(tiny_files, tmp_path / "a.safetensors", "--gpus", "2", "--device", "auto")
    assert main(["train", *flags]) == 2
    assert "--gpus is 2, and this machine has 1 CUDA cards; accepted is 1." in capsys.readouterr().err


def test_another_number_than_the_launcher_started_is_refused(tiny_files, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["train", *training_flags(tiny_files, tmp_path / "a.safetensors", "--gpus", "3")]) == 2
    assert "--gpus is 3, but the launcher started 2 processes; leave --gpus out." in capsys.readouterr().err


def test_one_card_of_a_name_is_not_several(tiny_files, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    flags = training_flags(tiny_files, tmp_path / "a.safetensors", "--device", "cuda:1")
    assert main(["train", *flags]) == 2
    assert 'device is "cuda:1"' in capsys.readouterr().err


def test_one_card_is_an_ordinary_run(tiny_files, tmp_path):
    output = tmp_path / "a.safetensors"
    assert main(["train", *training_flags(tiny_files, output, "--gpus", "1", "--steps", "1", "--device", "cpu")]) == 0
    assert output.exists()


def start(arguments):
    surroundings = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "spo", *arguments], env=surroundings, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def after_an_update(process, folder):
    """Wait until a first stage is written."""
    deadline = time.monotonic() + 300
    while not list(folder.glob("*-step*.safetensors")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def difference(one, other):
    first, second = read_lora(one).layers, read_lora(other).layers
    return max(float((first[name].up - second[name].up).abs().max()) for name in first)


@pytest.mark.slow
@several
def test_two_processes_end_in_the_lora_of_one(tiny_files, trained, tmp_path):
    pytest.importorskip("accelerate")
    output = tmp_path / "two.safetensors"
    process = start(["train", *training_flags(tiny_files, output, "--steps", "12", "--gpus", "2")])
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    assert out.count("trains ") == out.count("LoRA    ") == 1
    assert "Traceback" not in err
    assert difference(output, trained("tiny.safetensors").output) < 1e-5


@pytest.mark.slow
@several
def test_ctrl_c_reaches_all_and_the_state_is_saved_once(tiny_files, trained, tmp_path):
    pytest.importorskip("accelerate")
    output = tmp_path / "stopped.safetensors"
    flags = training_flags(tiny_files, output, "--steps", "12")
    process = start(["train", *flags, "--gpus", "2"])
    after_an_update(process, tmp_path)
    os.killpg(process.pid, signal.SIGINT)  # as the terminal does, and the launcher passes it on
    out, err = process.communicate(timeout=300)
    assert process.returncode == 130, err
    assert out.count("Stopped after") == 1 and "Traceback" not in err
    assert not output.exists()
    assert main(["train", "--resume", *flags]) == 0  # by one process
    assert difference(output, trained("tiny.safetensors").output) < 1e-5


@pytest.mark.slow
@several
def test_a_killed_process_ends_all_with_one_sentence(tiny_files, tmp_path):
    pytest.importorskip("accelerate")
    psutil = pytest.importorskip("psutil")
    output = tmp_path / "killed.safetensors"
    process = start(["train", *training_flags(tiny_files, output, "--steps", "500", "--gpus", "2")])
    after_an_update(process, tmp_path)
    workers = sorted(psutil.Process(process.pid).children(), key=lambda one: one.pid)
    workers[-1].kill()
    began = time.monotonic()
    _, err = process.communicate(timeout=120)
    assert time.monotonic() - began < 60
    assert process.returncode == 2
    last = [line for line in err.splitlines() if line.startswith("spo:")]
    assert len(last) == 1 and "was killed (signal 9" in last[0] and "--resume" in last[0]
    assert "Traceback" not in err
    assert RunFiles.of(output).state.exists()
    assert all(not worker.is_running() for worker in workers)

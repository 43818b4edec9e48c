"""`spo train` on a tiny checkpoint: what is written, what is said when something is wrong, and stops of every kind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
from PIL import Image

from spo.cli import train as train_command
from spo.cli.main import main
from spo.lora.read import read_lora
from spo.progress import Watcher
from spo.runs.layout import RunFiles
from tests.tiny_files import training_flags
from tests.tiny_host import same_weights

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("checkpoint", ["tiny.safetensors", "tiny-xl.safetensors"])
def test_what_a_run_leaves(trained, checkpoint):
    output = trained(checkpoint).output
    run = output.with_suffix(".spo")
    assert {path.name for path in run.iterdir()} >= {"config.json", "curves.png", "metrics.csv", "state.spo"}
    Image.open(run / "curves.png").verify()
    assert json.loads(output.with_suffix(".spo.json").read_text())["steps"] == 12
    assert [path.name for path in RunFiles.of(output).stages()] == [
        f"mine-step{step:06d}.safetensors" for step in (9, 10, 11)
    ]
    assert "trains" in trained(checkpoint).text
    assert str(output) in trained(checkpoint).text


def test_dry_run_prints_the_plan_and_writes_nothing(tiny_files, tmp_path, capsys):
    assert main(["train", *training_flags(tiny_files, tmp_path / "x" / "a.safetensors", "--dry-run")]) == 0
    plan = capsys.readouterr().out
    # 4 steps, divert 1, K = 2, guided: calls 0 and 1 see one latent, calls 2 and 3 see two: 2 (2 + 2 * 2) = 12
    assert "12 network evaluations and 6 pictures scored for at most 3 pairs" in plan
    assert list(tmp_path.iterdir()) == []


def test_flags_and_configuration_file_have_the_same_names(tiny_files, tmp_path, capsys):
    given = training_flags(tiny_files, tmp_path / "a.safetensors")
    values = dict(zip([name[2:].replace("-", "_") for name in given[::2]], given[1::2], strict=True))
    (tmp_path / "run.json").write_text(json.dumps({**values, "rank": 3}))
    assert main(["train", "--config", str(tmp_path / "run.json"), "--steps", "1"]) == 0
    saved = json.loads((tmp_path / "a.spo.json").read_text())
    assert (saved["rank"], saved["steps"]) == (3, 1)
    assert read_lora(tmp_path / "a.safetensors").metadata["ss_network_dim"] == "3"


def crafted(tiny_files, kind):
    """A bad value for one flag: (flag, value, what the sentence must say)."""
    broken = tiny_files / "broken.safetensors"
    whole = (tiny_files / "tiny.safetensors").read_bytes()
    broken.write_bytes(whole[: len(whole) // 2])
    (tiny_files / "empty.txt").write_text("\n\n")
    (tiny_files / "bad.json").write_text('{"learning_rte": 1}')
    return {
        "missing checkpoint": ("--checkpoint", tiny_files / "nothing.safetensors", "nothing.safetensors"),
        "truncated checkpoint": ("--checkpoint", broken, "truncated"),
        "a preference model as checkpoint": ("--checkpoint", tiny_files / "taste.safetensors", "taste.safetensors"),
        "empty prompts": ("--prompts", tiny_files / "empty.txt", "has no prompt in it"),
        "one candidate": ("--candidates", 1, "candidates is 1; accepted is 2 to 64"),
        "unknown key": ("--config", tiny_files / "bad.json", 'did you mean "learning_rate"'),
        "unknown flag": ("--learning-rte", 1, "--learning-rate"),
        "not a number": ("--rank", "many", "rank is 'many'; it must be a whole number"),
        "folder that cannot be": ("--output", tiny_files / "prompts.txt" / "a.safetensors", "cannot be written"),
        "no name": ("--output", tiny_files / "a.bin", "must be the name of a .safetensors file"),
        "unknown ladder": ("--sigmas", "kerras", 'did you mean "karras"'),
        "unknown kind of modules": ("--modules", "atention", 'did you mean "attention"'),
        "missing preference model": ("--preference", tiny_files / "none.safetensors", "none.safetensors"),
        "missing start": ("--start-from", tiny_files / "none.safetensors", "none.safetensors"),
        "a checkpoint as start": ("--start-from", tiny_files / "tiny.safetensors", "checkpoint"),
        "no such device": ("--device", "cuda:77", "cuda:77"),
        "too many clip layers": ("--clip-skip", 9, "9"),
    }[kind]


BAD = [
    "missing checkpoint", "truncated checkpoint", "a preference model as checkpoint", "empty prompts", "one candidate",
    "unknown key", "unknown flag", "not a number", "folder that cannot be", "no name", "unknown ladder",
    "unknown kind of modules", "missing preference model", "missing start", "a checkpoint as start", "no such device",
    "too many clip layers",
]  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_gets_one_sentence_and_exit_code_2_with_nothing_written(tiny_files, tmp_path, capsys, kind):
    flag, value, said = crafted(tiny_files, kind)
    given = training_flags(tiny_files, tmp_path / "out" / "a.safetensors")
    if flag in given:
        given[given.index(flag) + 1] = str(value)
    else:
        given += [flag, str(value)]
    assert main(["train", *given]) == 2
    errors = capsys.readouterr().err
    lines = [line for line in errors.splitlines() if line.startswith("spo: ")]
    assert len(lines) == 1
    assert said in lines[0]
    assert "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []


def test_a_lora_for_another_architecture_is_refused_as_start(tiny_files, trained, tmp_path, capsys):
    sdxl = trained("tiny-xl.safetensors").output
    output = tmp_path / "sd15.safetensors"
    assert main(["train", *training_flags(tiny_files, output, "--start-from", str(sdxl))]) == 2
    assert "SDXL" in capsys.readouterr().err
    assert not output.exists()
    assert not output.with_suffix(".spo").exists()


def test_a_stop_before_the_first_update_is_called_a_stop(tiny_files, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train_command, "progress_bar", lambda index: nullcontext(Watcher(should_stop=lambda: True)))
    output = tmp_path / "a.safetensors"
    assert main(["train", *training_flags(tiny_files, output)]) == 130
    text = capsys.readouterr().out
    assert "Stopped after 0 updates. Go on with: spo train --resume" in text
    assert "No pair" not in text
    monkeypatch.undo()
    assert main(["train", "--resume", *training_flags(tiny_files, output, "--steps", "1")]) == 0


def test_diffusion_dpo_on_a_folder_of_pairs(tiny_files, tmp_path, capsys):
    folder = tmp_path / "pairs"
    folder.mkdir()
    for side, value in (("win", 250), ("lose", 20)):
        Image.new("RGB", (64, 64), (value, 90, 90)).save(folder / f"a_{side}.png")
    (folder / "a.txt").write_text("a fox")
    given = training_flags(tiny_files, tmp_path / "a.safetensors", "--method", "dpo", "--pairs", str(folder))
    flags = dict(zip(given[::2], given[1::2], strict=True))
    del flags["--prompts"], flags["--preference"]
    given = [part for flag in flags.items() for part in flag]
    assert main(["train", *given, "--dry-run"]) == 0
    assert "0 network evaluations and 0 pictures scored for at most 1 pairs" in capsys.readouterr().out
    assert main(["train", *given, "--dry-run", "--card-gib", "8"]) == 0
    assert "8 GiB, 1 of it for the driver: fits" in capsys.readouterr().out
    assert main(["train", *given]) == 0
    config = json.loads(read_lora(tmp_path / "a.safetensors").metadata["spo_config"])
    assert (config["method"], config["pairs"], config["train_guidance"]) == ("dpo", str(folder), False)
    del flags["--method"]
    assert main(["train", *(part for flag in flags.items() for part in flag)]) == 2
    assert "--prompts is missing" in capsys.readouterr().err


def test_a_run_that_keeps_no_pair_says_what_to_change(tiny_files, tmp_path, capsys):
    flags = training_flags(tiny_files, tmp_path / "a.safetensors", "--threshold", "1", "--steps", "0", "--epochs", "1")
    assert main(["train", *flags]) == 2
    assert "lower threshold (now 1)" in capsys.readouterr().out


def start(arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "spo", *arguments], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="signals are POSIX's")
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, getattr(signal, "SIGKILL", None)])
def test_a_killed_process_resumes_to_the_same_lora_bit_for_bit(tiny_files, trained, tmp_path, how):
    length = ["--steps", "12"]
    output = tmp_path / "killed.safetensors"
    process = start(["train", *training_flags(tiny_files, output, *length)])
    deadline = time.monotonic() + 600
    while not list(tmp_path.glob("killed-step00000[2-9].safetensors")):
        assert process.poll() is None, process.stdout.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(how)
    text = process.communicate(timeout=300)[0].decode()
    assert not output.exists(), text
    if how != signal.SIGKILL:
        assert process.returncode == 130, text
        assert "--resume" in text
    leftovers = [path.name for path in tmp_path.rglob("*.tmp")]
    assert how == signal.SIGKILL or not leftovers

    assert main(["train", "--resume", *training_flags(tiny_files, output, *length)]) == 0
    whole = trained("tiny.safetensors").output
    assert same_weights(read_lora(output).layers, read_lora(whole).layers)

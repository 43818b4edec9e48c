"""The command line on a tiny checkpoint: what a user types, what is written, what is said when something is wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from spo.cli.main import main, parser
from spo.cli.settings_flags import given_values
from spo.lora.read import read_lora
from spo.preference.latent_cnn import LatentCNN, save_latent_cnn
from tests.tiny_checkpoints import write_tiny_sd15, write_tiny_sdxl
from tests.tiny_host import same_weights

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A tiny SD1.5 and SDXL checkpoint, prompts, and a preference model with random weights."""
    folder = tmp_path_factory.mktemp("files")
    write_tiny_sd15(folder / "tiny.safetensors", res_blocks=2)
    write_tiny_sdxl(folder / "tiny-xl.safetensors", res_blocks=2)
    (folder / "prompts.txt").write_text("a fox\na boat\na pear\n")
    torch.manual_seed(0)
    save_latent_cnn(LatentCNN(16), folder / "taste.safetensors", {})
    return folder


def flags(files, output, *more, checkpoint="tiny.safetensors"):
    values = {
        "checkpoint": files / checkpoint,
        "prompts": files / "prompts.txt",
        "preference": files / "taste.safetensors",
        "output": output,
        "width": 64,
        "height": 64,
        "sampling-steps": 4,
        "divert-start-step": 1,
        "candidates": 2,
        "threshold": 0,
        "prompts-per-batch": 2,
        "pairs-per-update": 2,
        "accumulation": 1,
        "steps": 6,
        "learning-rate": 1e-3,
        "save-every": 1,
        "device": "cpu",
    }
    return [part for name, value in values.items() for part in (f"--{name}", str(value))] + list(more)


@pytest.mark.parametrize("checkpoint", ["tiny.safetensors", "tiny-xl.safetensors"])
def test_trains_compares_and_inspects(files, tmp_path, capsys, checkpoint):
    output = tmp_path / "loras" / "mine.safetensors"
    assert main(["train", *flags(files, output, checkpoint=checkpoint)]) == 0
    said = capsys.readouterr().out
    assert "trains" in said
    assert str(output) in said
    run = output.with_suffix(".spo")
    assert {path.name for path in run.iterdir()} >= {"config.json", "curves.png", "metrics.csv", "state.spo"}
    Image.open(run / "curves.png").verify()
    assert json.loads(output.with_suffix(".spo.json").read_text())["steps"] == 6
    assert sorted(path.name for path in output.parent.glob("*-step*")) == [
        f"mine-step00000{step}.safetensors" for step in (3, 4, 5)
    ]

    wanted = ["checkpoint", "prompts", "preference", "width", "height", "sampling-steps", "device"]
    given = flags(files, output, checkpoint=checkpoint)
    kept = [part for name in wanted for part in (f"--{name}", given[given.index(f"--{name}") + 1])]
    grid = tmp_path / "grid.png"
    again = ["--lora", str(output), "--weights", "0", "1", "--limit", "2", "--output", str(grid)]
    assert main(["compare", *kept, *again]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if "mine" in line or "base" in line]
    assert len(rows) >= 3
    assert Image.open(grid).width > 3 * 64

    assert main(["inspect", str(output)]) == 0
    assert "LoRA" in capsys.readouterr().out
    assert main(["inspect", str(files / checkpoint)]) == 0
    assert ("sdxl" if "xl" in checkpoint else "sd15") in capsys.readouterr().out


def test_dry_run_prints_the_plan_and_writes_nothing(files, tmp_path, capsys):
    assert main(["train", *flags(files, tmp_path / "x" / "a.safetensors", "--dry-run")]) == 0
    said = capsys.readouterr().out
    # 4 steps, divert 1, K = 2, guided: calls 0 and 1 see one latent, calls 2 and 3 see two: 2 (2 + 2 * 2) = 12
    assert "12 network evaluations and 6 pictures scored for at most 3 pairs" in said
    assert list(tmp_path.iterdir()) == []


def test_flags_and_configuration_file_have_the_same_names(files, tmp_path, capsys):
    given = flags(files, tmp_path / "a.safetensors")
    values = dict(zip([name[2:].replace("-", "_") for name in given[::2]], given[1::2], strict=True))
    (tmp_path / "run.json").write_text(json.dumps({**values, "rank": 3}))
    assert main(["train", "--config", str(tmp_path / "run.json"), "--steps", "1"]) == 0
    saved = json.loads((tmp_path / "a.spo.json").read_text())
    assert (saved["rank"], saved["steps"]) == (3, 1)
    assert read_lora(tmp_path / "a.safetensors").metadata["ss_network_dim"] == "3"


def test_a_preset_gives_way_to_flags(files, tmp_path):
    asked = ["train", "--preset", "quick", "--rank", "2", "--output", str(tmp_path / "a.safetensors")]
    values = given_values(parser().parse_args(asked))
    assert (values["rank"], values["sampling_steps"]) == ("2", 12)


def crafted(files, kind):
    """A bad value for one flag: (flag, value, what the sentence must say)."""
    broken = files / "broken.safetensors"
    whole = (files / "tiny.safetensors").read_bytes()
    broken.write_bytes(whole[: len(whole) // 2])
    (files / "empty.txt").write_text("\n\n")
    (files / "bad.json").write_text('{"learning_rte": 1}')
    return {
        "missing checkpoint": ("--checkpoint", files / "nothing.safetensors", "nothing.safetensors"),
        "truncated checkpoint": ("--checkpoint", broken, "truncated"),
        "a preference model as checkpoint": ("--checkpoint", files / "taste.safetensors", "taste.safetensors"),
        "empty prompts": ("--prompts", files / "empty.txt", "has no prompt in it"),
        "one candidate": ("--candidates", 1, "candidates is 1; accepted is 2 to 64"),
        "unknown key": ("--config", files / "bad.json", 'did you mean "learning_rate"'),
        "unknown flag": ("--learning-rte", 1, "--learning-rate"),
        "not a number": ("--rank", "many", "rank is 'many'; it must be a whole number"),
        "folder that cannot be": ("--output", files / "prompts.txt" / "a.safetensors", "cannot be written"),
        "no name": ("--output", files / "a.bin", "must be the name of a .safetensors file"),
        "unknown ladder": ("--sigmas", "kerras", 'did you mean "karras"'),
        "unknown kind of modules": ("--modules", "atention", 'did you mean "attention"'),
        "missing preference model": ("--preference", files / "none.safetensors", "none.safetensors"),
        "missing start": ("--start-from", files / "none.safetensors", "none.safetensors"),
        "a checkpoint as start": ("--start-from", files / "tiny.safetensors", "checkpoint"),
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
def test_bad_input_gets_one_sentence_and_exit_code_2_with_nothing_written(files, tmp_path, capsys, kind):
    flag, value, said = crafted(files, kind)
    given = flags(files, tmp_path / "out" / "a.safetensors")
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


def test_a_lora_for_another_architecture_is_refused_as_start(files, tmp_path, capsys):
    sdxl = tmp_path / "xl.safetensors"
    assert main(["train", *flags(files, sdxl, "--steps", "1", checkpoint="tiny-xl.safetensors")]) == 0
    output = tmp_path / "sd15.safetensors"
    assert main(["train", *flags(files, output, "--start-from", str(sdxl))]) == 2
    assert "SDXL" in capsys.readouterr().err
    assert not output.exists()
    assert not output.with_suffix(".spo").exists()


@pytest.fixture
def one_thread():
    """Sums do not depend on how many threads share them."""
    former = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(former)


def start(arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "spo", *arguments], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


@pytest.mark.skipif(os.name == "nt", reason="signals are POSIX's")
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, getattr(signal, "SIGKILL", None)])
def test_a_killed_process_resumes_to_the_same_lora_bit_for_bit(files, tmp_path, one_thread, how):
    length = ["--steps", "24"]
    output = tmp_path / "killed.safetensors"
    process = start(["train", *flags(files, output, *length)])
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("killed-step00000[3-9].safetensors")):
        assert process.poll() is None, process.stdout.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(how)
    said = process.communicate(timeout=60)[0].decode()
    assert not output.exists(), said
    if how != signal.SIGKILL:
        assert process.returncode == 130, said
        assert "--resume" in said
    leftovers = [path.name for path in tmp_path.rglob("*.tmp")]
    assert how == signal.SIGKILL or not leftovers

    assert main(["train", "--resume", *flags(files, output, *length)]) == 0
    whole = tmp_path / "whole.safetensors"
    assert main(["train", *flags(files, whole, *length)]) == 0
    assert same_weights(read_lora(output).layers, read_lora(whole).layers)

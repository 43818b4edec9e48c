"""The memory of each phase, counted by the run's own code on the imaginary card."""

from __future__ import annotations

import json

import pytest
import torch

from spo.cli.main import main
from spo.config import build_config
from spo.headless.memory_plan import PHASES, RESERVE_GIB, MemoryPlan, count_memory
from spo.preference.latent_cnn import LatentCNN, save_latent_cnn
from tests.tiny_checkpoints import write_tiny_sd15, write_tiny_sdxl


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan")
    write_tiny_sd15(folder / "sd15.safetensors", res_blocks=2)
    write_tiny_sdxl(folder / "sdxl.safetensors", res_blocks=2)
    torch.manual_seed(0)
    save_latent_cnn(LatentCNN(16), folder / "taste.safetensors", {})
    (folder / "prompts.txt").write_text("a fox\na boat\n")
    return folder


def config(files, architecture, **changes):
    values = {
        "checkpoint": str(files / f"{architecture}.safetensors"),
        "preference": str(files / "taste.safetensors"),
        "output": str(files / "a.safetensors"),
        "width": 64,
        "height": 64,
        "rank": 4,
    }
    return build_config({**values, **changes}, architecture)


@pytest.mark.parametrize("architecture", ["sd15", "sdxl"])
def test_every_phase_but_the_decode_that_is_not_needed_is_counted(files, architecture):
    memory = count_memory(config(files, architecture), ["a fox", "a boat"], on_card=True)
    assert set(memory.phases_gib) == set(PHASES) - {"decode"}  # the latent CNN looks at latents
    assert memory.precision == "float16"
    assert all(0 < gib < 1 for gib in memory.phases_gib.values())
    assert memory.peak_gib == max(memory.phases_gib.values())


def test_a_card_needs_room_for_its_driver():
    memory = MemoryPlan({"load": 3.0, "train": 6.5}, "float16")
    assert memory.fits(6.5 + RESERVE_GIB)
    assert not memory.fits(6.5 + RESERVE_GIB - 0.1)
    assert "does not fit" in memory.text(7)


def flags(files, *more):
    names = {"checkpoint": "sd15.safetensors", "prompts": "prompts.txt", "preference": "taste.safetensors"}
    paths = [part for name, file in names.items() for part in (f"--{name}", str(files / file))]
    return ["train", *paths, "--output", str(files / "b.safetensors"), "--width", "64", "--height", "64", *more]


@pytest.mark.parametrize(("card_gib", "code"), [("12", 0), ("1.0001", 3)])
def test_dry_run_for_a_card_that_is_not_there(files, capsys, card_gib, code):
    assert main(flags(files, "--dry-run", "--card-gib", card_gib, "--json")) == code
    plan = json.loads(capsys.readouterr().out)
    assert plan["peak_gib"] == max(plan["phases_gib"].values())
    assert (plan["card_gib"], plan["fits"], plan["device"]) == (float(card_gib), code == 0, "cuda")
    assert not (files / "b.safetensors").exists()


@pytest.mark.parametrize("more", [["--card-gib", "12"], ["--json"], ["--dry-run", "--card-gib", "-1"]])
def test_flags_that_make_no_sense_are_refused(files, capsys, more):
    assert main(flags(files, *more)) == 2
    assert more[-2 if len(more) > 1 else 0].strip("-").split("-")[0] in capsys.readouterr().err

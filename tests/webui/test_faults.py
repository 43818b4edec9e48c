"""Runs in a real WebUI that end in a fault: the checkpoint's picture, the threads and the memory are as before.

Runs where SPO_WEBUI_DIR names a WebUI (see test_host.py). Runs go through the job, as the tab's do.
"""

from __future__ import annotations

import gc
import os
import random
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from spo.preference import load as preference_load
from tests.tiny_host import MeanOfChannel
from tests.webui import started
from tests.webui.test_host import load, networks_of, pytestmark, tree_of, txt2img, webui  # noqa: F401 - a fixture, a mark

RUNS = 20 if started.IS_FORK else 50  # forks are slow on a CPU
KINDS = ("preference", "optimizer", "nan", "stop", "abandon", "interrupt", "reload")


def resident_mib():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE") / 2**20


class Faulty(MeanOfChannel):
    """Works for `calls` pools, then does what `fault` does."""

    def __init__(self, calls, fault):
        super().__init__()
        self.calls, self.fault = calls, fault

    def score(self, candidates, prompts):
        self.calls -= 1
        scores = super().score(candidates, prompts)
        return self.fault(scores) if self.calls == 0 else scores


def raises(scores):
    raise KeyError("a fault in the preference model")


def one_run(kind, chance, name, monkeypatch):
    """Start a run that ends in a fault of this kind, wait for its end; its job."""
    from modules import shared

    from spo.webui.jobs import job, training
    from spo.webui.jobs.training import TrainingRequest, start_training

    calls = chance.randint(1, 12)
    faults = {
        "preference": raises,
        "nan": lambda scores: scores * float("nan"),
        "stop": lambda scores: (job.stop("save"), scores)[1],
        "abandon": lambda scores: (job.stop("now"), scores)[1],
        "interrupt": lambda scores: (shared.state.interrupt(), scores)[1],
        "reload": lambda scores: scores,
        "optimizer": lambda scores: scores,
    }
    preference = Faulty(calls, faults[kind])
    with monkeypatch.context() as patch:
        patch.setattr(training, "load_preference", lambda *args, **kwargs: preference)
        loaded = Path(shared.sd_model.sd_checkpoint_info.filename).stem
        patch.setattr(preference_load, "DEMO_CHECKPOINTS", (loaded,))  # so that "demo" is not refused here
        if kind == "optimizer":
            updates = chance.randint(1, 3)

            def step(self, *args, _left=[updates], **kwargs):  # noqa: B006 - counts
                _left[0] -= 1
                if _left[0] == 0:
                    raise RuntimeError("a fault in the optimizer")
                return real(self, *args, **kwargs)

            real = torch.optim.AdamW.step
            patch.setattr(torch.optim.AdamW, "step", step)
        settings = {
            "width": started.SIZE, "height": started.SIZE, "sampling_steps": 5, "divert_start_step": 1,
            "threshold": 0.0,
            "prompts_per_batch": 2, "pairs_per_update": 4, "accumulation": 1, "steps": 40, "learning_rate": 1e-2,
            "save_every": 0, "rank": 4, "preference": "demo", "candidates": 2, "inner_steps": 0,
            "gradient_checkpointing": chance.random() < 0.3,
        }  # fmt: skip
        begun = start_training(TrainingRequest(name, ["a fox", "a (boat:1.2)"], settings))
        if kind == "reload":
            time.sleep(chance.uniform(0.0, 4.0))
            job.end()
        assert job._thread is not None
        job._thread.join(900 if started.IS_FORK else 120)
    return begun


@pytest.mark.parametrize("checkpoint", [started.SD15, started.SDXL])
def test_faults_leave_no_trace(webui, monkeypatch, checkpoint):  # noqa: F811
    from modules import shared

    from spo.webui import folders, runs

    model = load(checkpoint)
    before = txt2img("Euler a")
    tree = tree_of(model)
    ended, memory, chance = {}, [], random.Random(1)
    threads = None
    for number in range(RUNS // 2):
        kind = KINDS[number % len(KINDS)]
        name = f"spo-fault-{checkpoint}-{number}"
        job = one_run(kind, chance, name, monkeypatch)
        ended.setdefault(kind, []).append(job.phase)
        assert job.phase in ("stopped", "failed"), (kind, job.phase, job.message)
        assert np.array_equal(txt2img("Euler a"), before), kind
        assert tree_of(model) == tree, kind
        assert not any(parameter.grad is not None for parameter in networks_of(model).parameters())
        assert not shared.state.interrupted
        assert shared.state.job == ""
        if (folders.run_folder(name) / "config.json").exists():
            runs.delete(name, True)
        alive = {thread.name for thread in threading.enumerate() if thread.is_alive()}
        assert not any(thread.startswith("spo ") for thread in alive)
        threads = threads or len(alive)
        assert len(alive) <= threads + 1, alive
        gc.collect()
        memory.append(resident_mib())
    assert not list(Path(shared.cmd_opts.lora_dir).rglob("spo-fault-*"))
    third = len(memory) // 3
    grown = np.median(memory[-third:]) - np.median(memory[third : 2 * third])
    print(f"{checkpoint}: {ended}; resident MiB {[round(m) for m in memory]}, grown {grown:.1f}")
    assert grown < 25

"""What one of several real processes does in the tests: `worker.py SCENARIO FOLDER`, started by Accelerate's launcher.

Every run of a scenario goes into its own folder; what a process saw of it goes into FOLDER/seen-INDEX.json.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
from pathlib import Path

import torch

from spo.cli.several import processes_of_launch
from spo.errors import SpoError
from spo.progress import Watcher
from spo.training import loop
from spo.training.loop import train
from spo.training.processes import Processes
from tests.tiny_host import PROMPTS, MeanOfChannel, TinyHost, small
from tests.training.test_validation import checked, judges

# name -> settings: more prompts than processes and fewer; pairs that wait for the next rollout; another method; checks
RUNS = {
    "plain": {"steps": 4},
    "carried": {"steps": 5, "inner_steps": 1, "accumulation": 2, "carry_pairs": True, "prompts_per_batch": 3},
    "averaged": {"steps": 3, "rollout_average": 0.9, "prompts_per_batch": 1},
    "uneven": {"steps": 4, "prompts_per_batch": 3, "threshold": 0.0},
    # at a beta of 2000 one bit of a log ratio is 1e-4 of the loss
    "dpo": {"method": "dpo", "pairs_per_prompt": 2, "threshold": 0.0, "steps": 3, "dpo_beta": 10.0},
    "checked": {"steps": 4, "validate_every": 2, "validate_pictures": 2},
}


def config_of(name: str, folder: Path, **changes):
    """The configuration of a run of `RUNS`, into folder/name."""
    make = checked if name == "checked" else small
    (folder / name).mkdir(exist_ok=True, parents=True)
    # calls of the same shapes in all processes, which round alike, and the paper's learning rate: at rates far above it
    # Adam's division makes differences of rounding large
    exact = {"learning_rate": 6e-5, "save_precision": "float32", "pairs_per_call": 1, "prompts_per_call": 1}
    values = {**exact, **RUNS[name]} if name in RUNS else {"steps": 4, "save_every": 1}
    return make(folder / name, **{**values, **changes})


class Selective(MeanOfChannel):
    """Finds a difference between candidates of the boat alone."""

    def score(self, candidates, prompts):
        scores = super().score(candidates, prompts)
        return scores * torch.tensor([float(prompt == "a boat") for prompt in prompts])


def run(name: str, folder: Path, processes=None, watcher=None, host=None, preference=None, resume=False, **changes):
    """One run; without processes it is the one to compare with."""
    config = config_of(name, folder, **changes)
    more = {"judges": judges()} if name == "checked" else {}
    if processes is not None:
        more["processes"] = processes
    preference = preference or (Selective() if name == "uneven" else MeanOfChannel())
    return train(host or TinyHost(config), config, PROMPTS, preference, watcher, resume=resume, **more)


class Failing(TinyHost):
    """A host whose training breaks in one process, at the third update."""

    def __init__(self, config, here: bool, breaks) -> None:
        super().__init__(config)
        self.here, self.breaks, self.calls = here, breaks, 0

    def denoise(self, x, sigma, prompts, step):
        result = super().denoise(x, sigma, prompts, step)
        if torch.is_grad_enabled() and self.here:
            self.calls += 1
            if self.calls >= 3:
                return self.breaks(self.calls, result)
        return result


def memory_once(call, result):
    if call == 3:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")
    return result


def memory(call, result):
    raise torch.cuda.OutOfMemoryError("CUDA out of memory")


def not_a_number(call, result):
    return result * float("nan")


def bug(call, result):
    raise ZeroDivisionError("a mistake of ours")


def killed(call, result):
    os.kill(os.getpid(), signal.SIGKILL)


def full_disk(*arguments):
    raise OSError(errno.ENOSPC, "No space left on device")


def faults(folder: Path, processes: Processes) -> dict[str, list]:
    """Name -> [what it ended with, the update, what was logged] in this process, of one run after the other."""
    seen: dict[str, list] = {}
    here = processes.index == 1

    def attempt(name: str, **more) -> None:
        said: list[str] = []
        stop = more.pop("stop", lambda: False)
        watcher = Watcher(log=said.append, should_stop=stop)
        try:
            report = run(name, folder, processes, watcher, **more)
            seen[name] = ["stopped" if not report.finished else "finished", report.steps, said]
        except (SpoError, ZeroDivisionError) as error:
            seen[name] = [f"{type(error).__name__}: {error}", -1, said]

    for breaks in (memory_once, memory, not_a_number, bug):
        name = breaks.__name__
        attempt(name, host=Failing(config_of(name, folder), here, breaks))
    asked: list[int] = []
    attempt("stop", stop=lambda: here and bool(asked.append(1) or len(asked) > 2))
    write_stage = loop.write_stage
    loop.write_stage = full_disk
    attempt("disk", save_every=0)
    loop.write_stage = write_stage
    attempt("exists", replace=False)
    attempt("exists", replace=False)
    return seen


def main() -> None:
    scenario, folder = sys.argv[1], Path(sys.argv[2])
    with processes_of_launch("cpu") as processes:
        seen: dict[str, list] = {}
        if scenario == "runs":
            for name in RUNS:
                report = run(name, folder, processes)
                seen[name] = ["finished", report.steps, []]
        elif scenario == "faults":
            seen = faults(folder, processes)
        elif scenario == "half":
            run("carried", folder, processes, Watcher(should_stop=stop_after(3)))
        elif scenario == "rest":
            run("carried", folder, processes, resume=True)
        elif scenario.startswith("kill"):
            here = processes.index == int(scenario[-1])
            run("killed", folder, processes, host=Failing(config_of("killed", folder), here, killed))
        (folder / f"seen-{processes.index}.json").write_text(json.dumps(seen))


def stop_after(rollouts: int):
    """Asked once between the updates and pools; true after so many."""
    asked: list[int] = []
    return lambda: bool(asked.append(1) or len(asked) > 4 * rollouts)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()

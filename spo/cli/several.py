"""One command in several processes: started by Accelerate's launcher, ended together, with one sentence."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from spo.config import Config
from spo.errors import SpoError
from spo.training.accelerated import AcceleratedProcesses, ProcessLostError
from spo.training.processes import ALONE, Processes, any_of

T = TypeVar("T")
ENDING_S = 60
GPUS_HELP = "work on N cards of this machine (default: 1), by Hugging Face Accelerate"
_BY_US = "SPO_STARTED_BY_GPUS"  # set for processes that `launch` started, which says itself when one of them dies


def add_gpus(parser: argparse.ArgumentParser) -> None:
    """Add --gpus to a command that several processes can do together."""
    parser.add_argument("--gpus", type=int, metavar="N", help=GPUS_HELP)


def is_started() -> bool:
    """Whether a launcher, Accelerate's or torchrun, has started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def launches(options: argparse.Namespace) -> bool:
    """Whether this process only starts others. SpoError for a number of cards that is not here."""
    wanted, started = getattr(options, "gpus", None), int(os.environ.get("WORLD_SIZE", "1"))
    if wanted is None:
        return False
    if is_started():
        if wanted != started:
            raise SpoError(f"--gpus is {wanted}, but the launcher started {started} processes; leave --gpus out.")
        return False
    device = getattr(options, "device", "auto")
    on_cpu = _on_cpu(device)
    here = os.cpu_count() or 1 if on_cpu else torch.cuda.device_count()
    if not 1 <= wanted <= here:
        of = "cores, and computes on them" if on_cpu else "CUDA cards"
        accepted = f"1 to {here}" if here > 1 else "1"
        raise SpoError(f"--gpus is {wanted}, and this machine has {here} {of}; accepted is {accepted}.")
    return wanted > 1


def launch(count: int, arguments: Sequence[str]) -> int:
    """Start `spo` with these arguments in `count` processes of this machine; the exit code of the first that failed.

    Accelerate's launcher, in this process. Ctrl-C and SIGTERM are passed on to the processes, which save and end; those
    that have not ended after `ENDING_S` are killed.
    """
    try:
        from accelerate.commands.launch import launch_command, launch_command_parser
    except ImportError:
        raise SpoError("--gpus needs Hugging Face Accelerate: pip install accelerate.") from None
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    own = [
        "--multi_gpu", f"--num_processes={count}", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no",
        "--main_process_port=0", "--module", "spo",
    ]  # fmt: skip
    settings: Any = launch_command_parser().parse_args([*own, *arguments])
    settings.shutdown_timeout = ENDING_S  # 30 seconds, where this PyTorch does not know the setting
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # what it has to say, we say
    os.environ[_BY_US] = "1"
    try:
        launch_command(settings)
    except ChildFailedError as error:
        return _exit_code({rank: failure.exitcode for rank, failure in error.failures.items()}, count)
    except (SignalException, KeyboardInterrupt):
        return 130
    finally:
        del os.environ[_BY_US]
    return 0


def _exit_code(codes: dict[int, int], count: int) -> int:
    """That of a process that ended by itself; SpoError where one was killed."""
    killed = [rank for rank, code in sorted(codes.items()) if code < 0 and -code != signal.SIGTERM]
    if killed:
        rank = killed[0]
        raise SpoError(
            f"Process {rank} of {count} was killed (signal {-codes[rank]}; the system does that when main memory runs "
            "out), so all ended; a training run goes on from its last state with --resume."
        )
    return max((code for code in codes.values() if code > 0), default=1)


def _on_cpu(device: str) -> bool:
    return device == "cpu" or (device == "auto" and not torch.cuda.is_available())


@contextmanager
def processes_of_launch(device: str) -> Iterator[Processes]:
    """The processes that a launcher started this one with; alone, without one. They end together.

    device  as configured; "auto" and "cuda" mean this process's card

    What only needs to be said once is: the standard output is the main process's, and of equal errors one is printed.
    """
    if not is_started():
        yield ALONE
        return
    # When one process has ended, for whatever reason, the launcher asks the others to, and kills them half a minute
    # later. They learn why at their next meeting, which comes sooner, and end with a sentence.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if device not in ("auto", "cpu", "cuda"):
        raise SpoError(
            f'device is "{device}"; of several processes each takes a card: accepted are auto, cuda and cpu.'
        )
    on_cpu = _on_cpu(device)
    if not on_cpu and not torch.distributed.is_nccl_available():
        raise SpoError("Several cards need NCCL, which this PyTorch lacks; use one card, or Linux.")
    local = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
    if not on_cpu and local > torch.cuda.device_count():
        cards = torch.cuda.device_count()
        raise SpoError(f"The launcher started {local} processes on this machine, which has {cards} CUDA cards.")
    try:
        processes = AcceleratedProcesses(on_cpu)
    except ImportError:
        raise SpoError("Several processes need Hugging Face Accelerate: pip install accelerate.") from None

    with open(os.devnull, "w") as nowhere, redirect_stdout(sys.stdout if processes.index == 0 else nowhere):
        try:
            yield processes
        except ProcessLostError as error:
            # a broken process group can keep a process from ending by itself
            if _BY_US not in os.environ and processes.is_first_to_say(str(error)):
                print(f"spo: {error}", file=sys.stderr, flush=True)
            os._exit(2)
        except KeyboardInterrupt:
            if processes.index == 0:
                raise
            raise SystemExit(130) from None
        except SpoError as error:
            says = processes.is_first_to_say(str(error))
            processes.told_of(error)
            if says:
                raise
            raise SystemExit(2) from error
        except Exception as error:
            processes.told_of(error)
            raise
        else:
            processes.part()


def on_own_device(config: Config, processes: Processes) -> Config:
    """The configuration with this process's card as the device; as it is, of a process alone."""
    device = getattr(processes, "device", config.model.device)
    return replace(config, model=replace(config.model, device=device))


def weights_of(config: Config) -> int:
    """Bytes of the files that a process reads before it trains."""
    judges = config.validation.judge, config.validation.adherence
    files = [Path(path) for path in (config.model.checkpoint, config.preference.preference, *judges) if path]
    return sum(file.stat().st_size for file in files if file.is_file())


def loaded(load: Callable[[], T], size_bytes: int, processes: Processes) -> T:
    """`load()`, one process after the other where main memory is short for all at once: a file's weights are there
    twice while they are brought to the card.
    """
    if processes.count > 1:
        import psutil

        short = psutil.virtual_memory().available < 2 * size_bytes * processes.count
        if any_of(processes, short):
            return processes.in_turn(load)
    return load()

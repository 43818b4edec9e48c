"""`spo fetch-preference sd15`: the published step-aware model, size first, to be gone on with when broken off."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from spo.files import size_text
from spo.preference.download import HUB, download, find_published
from spo.preference.official import OFFICIAL_FILES
from spo.preference.pickles import in_half


def add_fetch_preference(command: Callable[[str, Callable[[argparse.Namespace], int], str], Any]) -> None:
    """Add the command to the command line; `command(name, run, text)` makes its parser."""
    parser = command("fetch-preference", _run, "Fetch the published preference model from Hugging Face.")
    parser.add_argument("architecture", choices=list(OFFICIAL_FILES), help="of the checkpoint to train")
    parser.add_argument("--folder", type=Path, default=Path("."), help="where it goes (default: here)")
    parser.add_argument("--dry-run", action="store_true", help="say the size and stop")
    parser.add_argument("--hub", default=HUB, help=f"address of the hub or of a mirror (default: {HUB})")


def _run(options: argparse.Namespace) -> int:
    remote = find_published(options.architecture, folder=options.folder, hub=options.hub)
    print(remote.text())
    if options.dry_run:
        return 0
    with tqdm(total=remote.size_bytes, unit="B", unit_scale=True, file=sys.stderr) as bar:
        path = download(remote, options.folder, progress=lambda done, total: bar.update(done - bar.n))
    print(path)
    if (twin := in_half(path)) != path:
        print(f"{twin}  (in half precision, for GPUs: {size_text(twin.stat().st_size)})")
    return 0

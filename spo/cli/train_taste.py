"""`spo train-preference --kind taste`: a taste head from a folder of votes, with its accuracy beside other scorers'."""

from __future__ import annotations

import argparse
from pathlib import Path

from spo.errors import SpoError


def add_taste_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that only this kind has."""
    group = parser.add_argument_group("taste")
    group.add_argument("--votes", type=Path, metavar="FOLDER", help="the folder of votes")
    group.add_argument(
        "--against", action="append", default=[], metavar="FILE", help="another preference model to show beside it"
    )
    group.add_argument("--updates", type=int, default=300, help="optimizer updates of each member (default: 300)")


def train_taste(options: argparse.Namespace) -> int:
    """Fit the head, write it to `options.output`, and print how good it is. 0: done.

    options  votes, output, against (list), replace (bool), seed, updates (int)
    """
    from spo.files import exists_already
    from spo.preference.load import load
    from spo.preference.taste.fit import FitSettings, accuracy_of, fit_taste, read_vote_set
    from spo.preference.taste.head import save_taste
    from spo.preference.taste.votes import VoteFolder

    if options.votes is None:
        raise SpoError("--votes is missing; give the folder of votes.")
    output: Path = options.output
    if options.updates < 1:
        raise SpoError(f"--updates is {options.updates}; 1 or more are accepted.")
    if output.suffix.lower() != ".safetensors":
        raise SpoError(f'output is "{output}"; a taste head is a .safetensors file.')
    if output.exists() and not options.replace:
        raise exists_already(output)
    if not output.absolute().parent.is_dir():
        raise SpoError(f'the folder "{output.parent}" does not exist; make it or choose another one.')
    folder = VoteFolder(options.votes)
    votes = read_vote_set(folder)
    scorers = [load(name, architecture=votes.architecture) for name in options.against]
    others = [accuracy_of(scorer, folder, votes) for scorer in scorers]
    settings = FitSettings(seed=options.seed, updates=options.updates)
    fitted = fit_taste(votes, settings, name=output.stem, others=others)
    save_taste(fitted.head, output)
    print(f"{fitted.report.text()}\n\ntaste head  {output}  ({fitted.report.seconds:.0f} s)")
    return 0

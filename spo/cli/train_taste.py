"""`spo train-preference --kind taste`: a taste head from a folder of votes, with its accuracy beside other scorers'."""

from __future__ import annotations

import argparse
from pathlib import Path

from spo.errors import SpoError
from spo.files import exists_already
from spo.preference.load import load
from spo.preference.taste.fit import FitSettings, accuracy_of, fit_taste, read_vote_set
from spo.preference.taste.head import save_taste
from spo.preference.taste.votes import VoteFolder


def train_taste(options: argparse.Namespace) -> int:
    """Fit the head, write it to `options.output`, and print how good it is. 0: done.

    options  output (Path), replace (bool); where given, votes (Path), against (list of names), seed and updates (int)
    """
    if "votes" not in options:
        raise SpoError("--votes is missing; give the folder of votes.")
    settings = FitSettings(**{name: getattr(options, name) for name in ("seed", "updates") if name in options})
    output: Path = options.output
    if settings.updates < 1:
        raise SpoError(f"--updates is {settings.updates}; 1 or more are accepted.")
    if output.suffix.lower() != ".safetensors":
        raise SpoError(f'output is "{output}"; a taste head is a .safetensors file.')
    if output.exists() and not options.replace:
        raise exists_already(output)
    if not output.absolute().parent.is_dir():
        raise SpoError(f'the folder "{output.parent}" does not exist; make it or choose another one.')
    folder = VoteFolder(options.votes)
    votes = read_vote_set(folder)
    scorers = [load(name, architecture=votes.architecture) for name in getattr(options, "against", [])]
    others = [accuracy_of(scorer, folder, votes) for scorer in scorers]
    fitted = fit_taste(votes, settings, name=output.stem, others=others)
    save_taste(fitted.head, output)
    print(f"{fitted.report.text()}\n\ntaste head  {output}  ({fitted.report.seconds:.0f} s)")
    return 0

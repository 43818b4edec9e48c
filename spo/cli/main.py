"""The command line: `python -m spo train`, or `spo train` once installed; `spo --help` lists the commands."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from spo import __version__
from spo.cli.compare import add_compare
from spo.cli.convert import add_convert
from spo.cli.convert_preference import add_convert_preference
from spo.cli.demo import add_demo
from spo.cli.evaluate import add_evaluate
from spo.cli.fetch_preference import add_fetch_preference
from spo.cli.inspect_file import add_inspect
from spo.cli.train import add_train
from spo.cli.train_preference import add_train_preference
from spo.errors import SpoError, nearest


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. 0: done; 2: something the user can put right, said in one sentence; 130: stopped."""
    try:
        options, unknown = parser().parse_known_args(arguments)
        if unknown:
            flags = [flag for action in options.parser._actions for flag in action.option_strings]
            raise SpoError(f'"{unknown[0]}" is not known to "spo {options.command}"{nearest(unknown[0], flags)}.')
        options.arguments = sys.argv[1:] if arguments is None else list(arguments)
        return int(options.run(options))
    except SpoError as error:
        print(f"spo: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("spo: stopped.", file=sys.stderr)
        return 130


def parser() -> argparse.ArgumentParser:
    """The parser of all commands; the result holds `run`, the command's function, and `parser`, its own parser."""
    whole = argparse.ArgumentParser("spo", description="Improve the look of your own Stable Diffusion checkpoint.")
    whole.add_argument("--version", action="version", version=f"spo {__version__}")
    commands = whole.add_subparsers(dest="command", required=True)

    def command(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=text, description=text)
        made.set_defaults(run=run, parser=made)
        return made

    for add in (
        add_train,
        add_compare,
        add_evaluate,
        add_inspect,
        add_convert,
        add_train_preference,
        add_fetch_preference,
        add_convert_preference,
        add_demo,
    ):
        add(command)
    return whole


if __name__ == "__main__":
    sys.exit(main())

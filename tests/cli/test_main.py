"""The entry: commands, exit codes, and one sentence where something is wrong."""

from __future__ import annotations

import pytest

from spo import __version__
from spo.cli import train as train_command
from spo.cli.main import main, parser

COMMANDS = ("train", "compare", "inspect", "train-preference", "fetch-preference", "demo")


def test_help_lists_every_command(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert all(f"    {command} " in text for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: spo {command}")


def test_the_version(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"spo {__version__}\n"


def test_a_flag_of_another_command_is_unknown_and_the_nearest_is_named(capsys):
    assert main(["compare", "--weigths", "1"]) == 2
    assert capsys.readouterr().err == 'spo: "--weigths" is not known to "spo compare", did you mean "--weights"?.\n'


def test_ctrl_c_ends_with_130(monkeypatch, capsys):
    def stopped(options):
        raise KeyboardInterrupt

    monkeypatch.setattr(train_command, "_run", stopped)
    assert main(["train"]) == 130
    assert capsys.readouterr().err == "spo: stopped.\n"


def test_every_command_knows_its_own_parser():
    assert parser().parse_args(["inspect", "x"]).parser.prog == "spo inspect"

"""`spo train-preference --kind taste`, from votes to a file that loads."""

from __future__ import annotations

from spo.cli.main import main
from spo.preference.load import load
from spo.preference.taste.votes import VoteFolder
from tests.vote_worlds import answer, pair


def test_the_command_line(tmp_path, capsys):
    folder = VoteFolder(tmp_path / "votes")
    for number in range(60):
        made = pair(number)
        folder.add(made, "skip" if number % 10 == 9 else answer(made))
    flags = ["train-preference", "--kind", "taste", "--updates", "30", "--votes", str(folder.path)]
    output = tmp_path / "mine.safetensors"
    assert main([*flags, "--output", str(output), "--against", "demo"]) == 0
    told = capsys.readouterr().out
    assert "54 votes prefer a side, 0 are ties." in told and "always the first" in told and "finished picture" in told
    assert load(output).facts.checkpoint_hash == "0123456789"
    assert main(["inspect", str(output)]) == 0
    assert "mine: a taste head for sd15, fitted to 54 votes" in capsys.readouterr().out
    assert main([*flags, "--output", str(output)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert main([*flags, "--output", str(tmp_path / "mine.bin")]) == 2
    assert main(["train-preference", "--output", str(tmp_path / "x.safetensors")]) == 2
    assert "--votes is missing" in capsys.readouterr().err
    assert main([*flags[:-1], str(tmp_path / "none"), "--output", str(tmp_path / "x.safetensors")]) == 2
    assert "holds no vote" in capsys.readouterr().err

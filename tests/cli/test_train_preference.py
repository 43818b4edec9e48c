"""`spo train-preference`: flags of the one kind are not swallowed by the other."""

from __future__ import annotations

import pytest

from spo.cli.main import main


@pytest.mark.parametrize(
    ("kind", "flags", "message"),
    [
        ("taste", ["--learning-rate", "1"], "--learning-rate belongs to --kind clip, and --kind is taste"),
        ("taste", ["--checkpoint", "x.safetensors"], "--checkpoint belongs to --kind clip, and --kind is taste"),
        ("taste", ["--resume"], "--resume belongs to --kind clip, and --kind is taste"),
        ("clip", ["--votes", "votes"], "--votes belongs to --kind taste, and --kind is clip"),
        ("clip", ["--updates", "5"], "--updates belongs to --kind taste, and --kind is clip"),
    ],
)
def test_flags_of_the_other_kind_are_refused(tmp_path, capsys, kind, flags, message):
    output = tmp_path / "x.safetensors"
    assert main(["train-preference", "--kind", kind, "--output", str(output), *flags]) == 2
    assert message in capsys.readouterr().err
    assert not output.exists()


def test_what_each_kind_needs_is_named(tmp_path, capsys):
    output = ["--output", str(tmp_path / "x.safetensors")]
    for flags, missing in (
        ([], "--votes is missing"),
        (["--kind", "clip"], "--data is missing"),
        (["--kind", "clip", "--data", "pairs"], "--start is missing"),
        (["--kind", "clip", "--data", "pairs", "--start", "clip"], "--checkpoint is missing"),
    ):
        assert main(["train-preference", *output, *flags]) == 2
        assert missing in capsys.readouterr().err

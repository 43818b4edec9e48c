"""`spo fetch-preference`, from a server on this machine."""

from __future__ import annotations

from spo.cli.main import main
from spo.preference.pickles import TWIN_SUFFIX
from tests.preference import test_download

CONTENT = test_download.CONTENT
hub = test_download.hub


def test_size_first_then_the_file(hub, tmp_path, capsys):
    arguments = ["fetch-preference", "sd15", "--folder", str(tmp_path / "models"), "--hub", hub.url]
    assert main([*arguments, "--dry-run"]) == 0
    assert "(5.12 MB)" in capsys.readouterr().out and not (tmp_path / "models").exists()
    assert main(arguments) == 0
    assert (tmp_path / "models" / "sd-v1-5_step-aware_preference_model.bin").read_bytes() == CONTENT


def test_the_twin_in_half_precision_is_named(hub, tmp_path, capsys, monkeypatch):
    def write_twin(path):
        twin = path.with_name(path.stem + TWIN_SUFFIX)
        twin.write_bytes(b"x" * 1000)
        return twin

    monkeypatch.setattr("spo.cli.fetch_preference.in_half", write_twin)
    assert main(["fetch-preference", "sd15", "--folder", str(tmp_path), "--hub", hub.url]) == 0
    *_, whole, half = capsys.readouterr().out.splitlines()
    assert whole == str(tmp_path / "sd-v1-5_step-aware_preference_model.bin")
    assert half.startswith(str(tmp_path / f"sd-v1-5_step-aware_preference_model{TWIN_SUFFIX}  (in half precision"))


def test_what_stands_in_the_way_is_said(hub, tmp_path, capsys):
    hub.tells_hash = False
    assert main(["fetch-preference", "sd15", "--folder", str(tmp_path), "--hub", hub.url]) == 2
    assert "tells no size and SHA-256" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []

"""The demo in a WebUI's folders: what is written, what is never replaced, what the user is told."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import yaml

from spo.checkpoint.inspect import inspect_checkpoint
from spo.cli.main import main
from spo.demo import install
from spo.demo.install import config_text, install_demo, models_folder
from spo.errors import SpoError


@pytest.fixture
def webui(tmp_path):
    folder = tmp_path / "my web ui's: #1 ünïcode"
    (folder / "models" / "Stable-diffusion").mkdir(parents=True)
    return folder


def version(text):
    """The folder that the yaml names."""
    return yaml.safe_load(text)["model"]["params"]["cond_stage_config"]["params"]["version"]


def test_everything_the_webui_needs_is_written_and_a_second_time_nothing(webui):
    done = install_demo(models_folder(webui))
    assert len(done.written) == 7 and done.written[-1] == done.checkpoint
    assert done.checkpoint == webui / "models" / "Stable-diffusion" / "spo-demo.safetensors"
    assert version(done.config.read_text(encoding="utf-8")) == str(done.text_encoder)
    names = {"config.json", "merges.txt", "special_tokens_map.json", "tokenizer_config.json", "vocab.json"}
    assert {path.name for path in done.text_encoder.iterdir()} == names
    assert inspect_checkpoint(done.checkpoint).architecture == "sd15"
    assert str(done.checkpoint) in done.text() and "64 x 64 pixels" in done.text()

    again = install_demo(models_folder(webui))
    assert again.written == () and again.text().startswith("already there")


def test_checkpoints_may_lie_elsewhere(webui, tmp_path):
    done = install_demo(models_folder(webui), tmp_path / "new folder")
    assert done.checkpoint.parent == done.config.parent == tmp_path / "new folder"
    assert done.text_encoder.parent == webui / "models" / "SPO"


@pytest.mark.parametrize("name", ["spo-demo.safetensors", "spo-demo.yaml"])
def test_another_file_of_that_name_is_kept_and_nothing_is_written(webui, name):
    file = webui / "models" / "Stable-diffusion" / name
    file.write_text("mine")
    with pytest.raises(SpoError, match=f'{name}" is there already with other content'):
        install_demo(models_folder(webui))
    assert file.read_text() == "mine"
    assert [path for path in webui.rglob("*") if path.is_file()] == [file]


def test_a_folder_that_is_no_webui(tmp_path, capsys):
    assert main(["demo", "--install", str(tmp_path)]) == 2
    assert "is not a WebUI folder: there is no folder models/Stable-diffusion in it." in capsys.readouterr().err
    with pytest.raises(SpoError, match="is not a folder"):
        install_demo(tmp_path / "nowhere", tmp_path)


def test_the_command(webui, capsys):
    assert main(["demo", "--install", str(webui)]) == 0
    assert "choose spo-demo" in capsys.readouterr().out
    assert main(["demo", "--ckpt-dir", str(webui)]) == 2
    assert "--ckpt-dir goes with --install." in capsys.readouterr().err


def test_a_full_disk_leaves_no_half_file(webui, monkeypatch):
    def full(path, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(SpoError, match=r"cannot be put into the WebUI: .*merges.txt.*: No space left on device"):
        install_demo(models_folder(webui))
    assert not [path for path in webui.rglob("*") if path.is_file()]


def test_a_folder_that_cannot_be_made(webui):
    (webui / "models" / "SPO").write_text("a file where a folder is wanted")
    with pytest.raises(SpoError, match="cannot be put into the WebUI"):
        install_demo(models_folder(webui))


def test_a_folder_that_may_not_be_written(webui, monkeypatch):
    def refused(path, **options):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    models = models_folder(webui)
    monkeypatch.setattr(Path, "mkdir", refused)
    with pytest.raises(SpoError, match="Permission denied"):
        install_demo(models)


@pytest.mark.parametrize(
    "folder", [r"C:\Users\New User\webui\models", '/a\'b "c" # d: e', r"/x\n{y}", "/p${z}q", r"/p\${z}q"]
)
def test_any_path_comes_out_of_the_yaml_as_it_went_in(folder, monkeypatch):
    omegaconf = pytest.importorskip("omegaconf", reason="the WebUI's YAML reader") if "$" in folder else None
    path = type("Folder", (), {"__str__": lambda self: folder})()
    text = config_text(path)
    read = omegaconf.OmegaConf.create(text).model.params.cond_stage_config.params if omegaconf else None
    assert (read.version if omegaconf else version(text)) == folder
    assert install.PLACEHOLDER not in text

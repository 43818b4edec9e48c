"""Who judges the stages of a run: those asked for, or others beside the model that training follows."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from spo.config import build_config
from spo.errors import SpoError
from spo.preference.load import PreferenceInfo, PreferenceList
from spo.training import judges
from spo.training.judges import load_judges, with_judges


def configured(**changes):
    values = {"checkpoint": "mine.safetensors", "prompts": "p.txt", "output": "out.safetensors", **changes}
    return build_config(values)


def resolved(prompts=("fox",), **changes):
    validation = with_judges(configured(**changes), "sd15", list(prompts)).validation
    return validation.judge, validation.adherence


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of models by name -> (kind, architecture); the file's text is its content."""

    def fill(**kinds):
        infos = {}
        for name, (kind, architecture) in kinds.items():
            path = tmp_path / f"{name}.safetensors"
            path.write_text(name)
            infos[path] = PreferenceInfo(path, name, kind, 1, "pixels", kind != "CLIP score", architecture)
        monkeypatch.setattr(judges, "list_preference_models", lambda place: PreferenceList(tuple(infos.values()), ()))
        monkeypatch.setattr(judges, "describe_preference", lambda name: infos[tmp_path / name])
        return lambda name: str(tmp_path / f"{name}.safetensors")

    return fill


def test_auto_takes_others_that_fit_and_never_the_one_trained_on(folder):
    path = folder(
        spo=("step-aware CLIP", "sd15"),
        spo_xl=("step-aware CLIP", "sdxl"),
        pick=("CLIP score", "any"),
        hps=("CLIP score", "any"),
        mine=("taste head", "sd15"),
    )
    assert resolved(preference=path("spo")) == (path("pick"), path("hps"))
    assert resolved(preference=path("pick")) == (path("hps"), "")
    assert resolved(preference=path("mine")) == ("", path("pick"))  # nobody else knows one's own taste
    assert resolved(preference=path("spo"), judge="none") == ("", path("pick"))
    assert resolved(preference=path("spo"), validate_every=0) == ("", "")
    assert resolved(preference=path("spo"), judge=path("hps")) == (path("hps"), path("pick"))


def test_auto_finds_nobody_where_there_is_nobody(folder, tmp_path):
    path = folder(spo=("step-aware CLIP", "sd15"))
    assert resolved(preference=path("spo")) == ("", "")
    assert resolved(preference="") == ("", "")
    assert resolved(preference=str(tmp_path / "elsewhere" / "a.safetensors")) == ("", "")


def test_the_demo_has_judges_of_its_own():
    assert resolved(preference="demo", checkpoint="spo-demo.safetensors", prompts=["skull"]) == (
        "demo-judge",
        "demo-adherence",
    )
    assert resolved(preference="demo", checkpoint="demo.safetensors", prompts=["a dull day"]) == ("demo-judge", "")
    assert resolved(preference="demo", checkpoint="mine.safetensors") == ("", "")
    mix = "0.8*demo + 0.2*demo-adherence"  # what training follows judges none of its stages
    assert resolved(preference=mix, checkpoint="demo.safetensors", prompts=["skull"]) == ("demo-judge", "")


def test_the_model_that_training_follows_is_no_judge(tmp_path):
    host = SimpleNamespace(device=torch.device("cpu"), architecture="sd15", checkpoint_name="demo.safetensors")
    with pytest.raises(SpoError, match='judge is "demo", which training follows'):
        load_judges(configured(preference="demo", judge="demo", adherence=""), host, print)
    said = []
    loaded = load_judges(configured(preference="demo", judge="demo-judge", adherence="none"), host, said.append)
    assert (loaded.judge.name, loaded.adherence, bool(loaded)) == ("demo-judge", None, True)
    assert said == ["Stages are judged by demo-judge."]
    assert not load_judges(configured(preference="demo", judge="", adherence=""), host, print)

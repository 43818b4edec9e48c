"""The state of a run: whole or not at all, read without running code, and refused with a sentence."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from spo.errors import SpoError
from spo.runs.state import load_state, save_state


class Thing:
    def __init__(self, value):
        self.value = value

    def state_dict(self):
        return {"value": self.value}

    def load_state_dict(self, state):
        self.value = state["value"]


def test_objects_come_back(tmp_path):
    weight = torch.nn.Parameter(torch.randn(3))
    optimizer = torch.optim.AdamW([weight])
    weight.grad = torch.ones(3)
    optimizer.step()
    objects = {"optimizer": optimizer, "thing": Thing([1, {"a": torch.arange(3)}, None, "text"])}
    save_state(tmp_path / "state.spo", "LoRA", {"seed": 5}, objects)
    again = {"optimizer": torch.optim.AdamW([weight]), "thing": Thing(None)}
    state = load_state(tmp_path / "state.spo", "LoRA")
    state.restore(again)
    assert state.facts == {"seed": 5}
    assert torch.equal(again["thing"].value[1]["a"], torch.arange(3))
    assert again["thing"].value[2:] == [None, "text"]
    moments = again["optimizer"].state_dict()["state"][0]
    assert torch.equal(moments["exp_avg"], optimizer.state_dict()["state"][0]["exp_avg"])
    assert [path.name for path in tmp_path.iterdir()] == ["state.spo"]


class Malicious:
    def __reduce__(self):
        return print, ("code ran",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no run to resume"),
        (b"", "is damaged or is not the state of a run"),
        (b"nonsense" * 100, "is damaged or is not the state of a run"),
        ({"a": torch.ones(1)}, "is not the state of a run; start anew"),
        (Malicious(), "is damaged or is not the state of a run"),
        ({"spo_state": 3}, r"format 3, this one reads 2"),
        ({"spo_state": 2, "kind": "step-aware CLIP"}, "trains a step-aware CLIP, not a LoRA"),
    ],
)
def test_other_files_are_refused(tmp_path, capsys, content, message):
    path = tmp_path / "state.spo"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(SpoError, match=message) as caught:
        load_state(path, "LoRA")
    assert "\n" not in str(caught.value)
    assert "code ran" not in capsys.readouterr().out


def test_half_a_file_is_refused(tmp_path):
    path = tmp_path / "state.spo"
    save_state(path, "LoRA", {}, {"thing": Thing(torch.randn(1000))})
    path.write_bytes(path.read_bytes()[:-700])
    with pytest.raises(SpoError, match="is damaged"):
        load_state(path, "LoRA")


def test_the_state_of_an_earlier_version_is_refused_with_a_way_out(tmp_path):
    save_file({"lora/a": torch.ones(1)}, tmp_path / "state.spo", {"spo_state": '{"format": 1}'})
    with pytest.raises(SpoError, match=r"written by an earlier version of SPO.*start anew and replace it"):
        load_state(tmp_path / "state.spo", "LoRA")


def test_a_torch_load_that_somebody_replaced_is_not_used(tmp_path, monkeypatch):
    """The WebUI does: its own answers None for a file with anything but tensors in it."""
    path, layer = tmp_path / "state.spo", torch.nn.Linear(2, 3)
    save_state(path, "LoRA", {"seed": 7}, {"layer": layer})
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: None)
    assert load_state(path, "LoRA").facts == {"seed": 7}

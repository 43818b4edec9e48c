"""LoRAs of a stand-in of a Forge's model: named by a prompt, and put back."""

from __future__ import annotations

import sys
from types import SimpleNamespace

from spo.webui import a1111
from spo.webui.forked import loras


class Objects:
    """The patched parts of a model; a copy has patches of its own, as theirs has."""

    def __init__(self, patches):
        self.patches = patches

    def shallow_copy(self):
        return Objects(list(self.patches))


def model(patches=()):
    merged = Objects(list(patches))
    return SimpleNamespace(forge_objects=merged, forge_objects_after_applying_lora=merged, current_lora_hash="of a")


def test_a_prompt_names_the_active_ones(monkeypatch):
    mine = model(["a"])

    def activate(prompt):
        mine.forge_objects_after_applying_lora = Objects([prompt])

    monkeypatch.setattr(a1111, "activate_networks", activate)
    loras.activate_networks("b", mine)
    assert mine.forge_objects.patches == ["b"]
    assert mine.forge_objects is not mine.forge_objects_after_applying_lora


def test_those_of_before_are_put_back(monkeypatch):
    extension = SimpleNamespace(loaded_networks=["a"])
    monkeypatch.setitem(sys.modules, "networks", extension)
    mine, listed = model(["a"]), extension.loaded_networks
    put_back = loras.active_networks(mine)
    mine.forge_objects.patches.append("ours")
    extension.loaded_networks[:] = ["ours"]
    mine.current_lora_hash = "of ours"
    put_back()
    assert extension.loaded_networks is listed
    assert listed == ["a"]
    assert mine.current_lora_hash == "of a"
    assert mine.forge_objects.patches == mine.forge_objects_after_applying_lora.patches == ["a"]


def test_without_the_lora_extension_the_patches_are_put_back(monkeypatch):
    monkeypatch.delitem(sys.modules, "networks", raising=False)
    mine = model(["a"])
    put_back = loras.active_networks(mine)
    mine.forge_objects = Objects([])
    put_back()
    assert mine.forge_objects.patches == ["a"]

"""Which WebUI is chosen, and that each speaks with the same names."""

from __future__ import annotations

from spo.webui import a1111, seam


def test_outside_every_webui_it_is_a1111s():
    assert seam.webui is a1111


def test_what_is_named_is_there():
    assert len(set(seam.webui.__all__)) == len(seam.webui.__all__) > 70
    assert all(hasattr(seam.webui, name) for name in seam.webui.__all__)

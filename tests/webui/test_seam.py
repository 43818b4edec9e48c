"""Which WebUI is chosen, and that each speaks with the same names."""

from __future__ import annotations

import inspect

import pytest

from spo.webui import a1111, forge, reforge, seam


def test_outside_every_webui_it_is_a1111s():
    assert seam.webui is a1111


@pytest.mark.parametrize("kind", [a1111, forge, reforge])
def test_each_kind_has_the_same_names(kind):
    assert kind.__all__ == a1111.__all__
    assert len(set(kind.__all__)) == len(kind.__all__) > 70
    assert all(hasattr(kind, name) for name in kind.__all__)


@pytest.mark.parametrize("kind", [forge, reforge])
def test_each_kind_asks_for_what_a1111s_asks_for(kind):
    """Every parameter without a default is of the same name, in the same place."""

    def asked(function):
        parameters = inspect.signature(function).parameters.values()
        return [(one.name, one.kind) for one in parameters if one.default is one.empty]

    functions = [name for name in a1111.__all__ if inspect.isfunction(getattr(a1111, name))]
    assert len(functions) > 50
    for name in functions:
        assert asked(getattr(kind, name)) == asked(getattr(a1111, name)), name

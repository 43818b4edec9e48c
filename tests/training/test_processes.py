"""How work is dealt out, and what one process does: nothing more than its work."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from spo.training.processes import ALONE, any_of, share_of


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("items", [0, 1, 3, 4, 10])
def test_shares_one_after_the_other_are_all(count, items):
    of = range(5, 5 + items)
    shares = [share_of(SimpleNamespace(index=index, count=count), of) for index in range(count)]
    assert [item for share in shares for item in share] == list(of)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_one_process_does_its_work_and_nothing_more():
    weight = torch.nn.Parameter(torch.zeros(2))
    weight.grad = gradient = torch.ones(2)
    ALONE.sum_gradients([weight])
    assert weight.grad is gradient
    assert ALONE.gather(lambda: weight)[0] is weight
    assert ALONE.on_main(lambda: 3) == ALONE.in_turn(lambda: 3) == 3
    assert any_of(ALONE, True) and not any_of(ALONE, False)
    assert share_of(ALONE, range(4)) == range(4)


def test_one_process_does_not_import_accelerate():
    """Where training is imported, as in the WebUI, and where the command line is."""
    lines = "import sys, spo.training.loop, spo.cli.several; print('accelerate' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True, check=True).stdout
    assert said.split() == ["False"]

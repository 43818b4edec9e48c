"""Best, worst and kept of pools of 2, 3, 4 and 8, recorded from the published implementation; column 0 is a tie."""

from __future__ import annotations

import pytest
import torch

from spo.algorithm.pairs import select_pairs


@pytest.mark.parametrize("count", [2, 3, 4, 8])
def test_selects_as_published(golden, count):
    t = golden("pair_selection")
    selection = select_pairs(t[f"K{count}.scores"], float(t["threshold"]))
    assert torch.equal(selection.kept, t[f"K{count}.valid"])
    assert torch.equal(torch.stack([selection.win, selection.lose]), t[f"K{count}.indices"])

"""Facts about storages: shared by views, gone with the storage, and holding none alive."""

from __future__ import annotations

import gc
import weakref

import torch

from spo.training.storages import StorageFacts, tensors_in


def test_views_share_a_fact_and_copies_do_not():
    facts, x = StorageFacts(), torch.zeros(4, 4)
    facts.put(x, "first")
    assert facts.get(x.t()[1:]) == facts.get(x.add_(1)) == "first"
    assert facts.get(x.clone()) is None
    facts.put(x.view(16), "second")
    assert (facts.get(x), len(facts)) == ("second", 1)
    facts.drop(x[0])
    facts.drop(x)
    assert (facts.get(x), len(facts)) == (None, 0)


def test_a_sweep_tells_what_has_died_and_only_that():
    facts, tensors = StorageFacts(), [torch.zeros(3) for _ in range(4)]
    for number, tensor in enumerate(tensors):
        facts.put(tensor, number)
    assert facts.sweep() == []
    view = tensors[0][1:]  # keeps its storage
    del tensors[2], tensors[0], tensor
    assert facts.sweep() == [2]
    assert facts.get(view) == 0
    del view
    assert (facts.sweep(), len(facts)) == ([0], 2)


def test_a_sweep_of_the_newest_leaves_older_ones():
    facts, old, new = StorageFacts(), torch.zeros(3), torch.zeros(3)
    facts.put(old, "old")
    facts.put(new, "new")
    del old, new
    assert facts.sweep(newest=1) == ["new"]
    assert len(facts) == 1
    assert facts.sweep() == ["old"]


def test_a_fact_holds_no_tensor_and_no_address_is_given_twice():
    facts, x = StorageFacts(), torch.zeros(1000)
    facts.put(x, "gone")
    alive = weakref.ref(x)
    del x
    gc.collect()
    assert alive() is None
    others = [torch.zeros(1000) for _ in range(50)]
    assert [facts.get(other) for other in others] == [None] * 50
    assert facts.sweep() == ["gone"]


def test_tensors_among_arguments():
    a, b, c, d = (torch.full((1,), float(n)) for n in range(4))
    parameter = torch.nn.Parameter(d)
    values = (a, 1, None, [b, "text", (c,)], {"x": parameter, "y": torch.float16}, {"z": [2.5]})
    assert [id(tensor) for tensor in tensors_in(*values)] == [id(tensor) for tensor in (a, b, c, parameter)]
    assert tensors_in() == []

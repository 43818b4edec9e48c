"""Training of a fixed number of steps: cut off anywhere, it goes on to the same weights."""

from __future__ import annotations

import pytest
import torch

from recipes.demo_checkpoint.steps import AverageOf, learning_rate, run_steps, updated


class CutOffError(Exception):
    pass


def trained(work, kill_before=None):
    """A linear layer and its average after six steps of random numbers; ends in CutOffError before that step."""
    torch.manual_seed(1)
    network = torch.nn.Linear(3, 2)
    average = AverageOf(network)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.0)

    def step(number):
        if number == kill_before:
            raise CutOffError
        with updated(optimizer, network, learning_rate(number / 6, 0.1)) as backward:
            loss = network(torch.randn(4, 3)).square().mean()
            backward(loss)
        average.update(number + 1)
        return {"loss": loss.item()}

    objects = {"network": network, "average": average, "optimizer": optimizer}
    work.mkdir(exist_ok=True)
    run_steps("stage", 6, objects, step, work=work, save_every=2)
    return [*network.parameters(), *average.weights.values()]


@pytest.mark.parametrize("kill_before", [0, 3, 4, 5])
def test_what_was_cut_off_ends_in_the_same_weights(tmp_path, kill_before):
    whole = trained(tmp_path / "whole")
    with pytest.raises(CutOffError):
        trained(tmp_path / "cut", kill_before)
    assert all(torch.equal(one, other) for one, other in zip(whole, trained(tmp_path / "cut"), strict=True))


def test_a_stage_that_is_done_is_left_as_it_is(tmp_path):
    whole = trained(tmp_path)
    again = trained(tmp_path, kill_before=0)  # no step is made
    assert all(torch.equal(one, other) for one, other in zip(whole, again, strict=True))


def test_the_rate_warms_up_and_falls_to_zero():
    assert learning_rate(0.0, 1.0) == 0.0
    assert learning_rate(0.03, 1.0) == pytest.approx(1.0)
    assert learning_rate(1.0, 1.0) == pytest.approx(0.0)


def test_the_average_begins_fast():
    network = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(network.weight)
    average = AverageOf(network)
    torch.nn.init.ones_(network.weight)
    average.update(1)
    assert float(average.weights["weight"]) == pytest.approx(1 - 2 / 11)

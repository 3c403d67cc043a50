"""Rates, groups and gradient scaling against arithmetic by hand."""

import math

import pytest
import torch
from torch import nn

from distill.training.optim import (
    gradient_norm,
    make_optimizer,
    rate_factor,
    scale_gradients_,
    set_rate,
    sharkfin_factor,
)

torch.set_num_threads(1)


def test_rate_curve_by_hand():
    factors = [rate_factor(step, steps=10, warmup_fraction=0.2) for step in range(10)]
    assert factors == pytest.approx([0.5, 1.0, 1.0, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8])
    assert [rate_factor(step, steps=4, warmup_fraction=0.0) for step in range(4)] == [1.0, 0.75, 0.5, 0.25]
    assert [rate_factor(step, steps=2, warmup_fraction=1.0) for step in range(2)] == [0.5, 1.0]


def test_sharkfin_starts_at_an_eighth_and_ends_at_one():
    assert sharkfin_factor(1.0, 1 / 64) == 1 / 8
    assert sharkfin_factor(1 / 16, 1 / 64) == 1 / 2
    assert sharkfin_factor(1 / 64, 1 / 64) == 1.0


def parts() -> nn.Module:
    module = nn.Module()
    module.matrix, module.table = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    module.bigram, module.gain = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))
    module.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    return module


def test_groups_rates_and_decay():
    module = parts()
    optimizer = make_optimizer(module, {"matrix": module.matrix})
    set_rate(optimizer, 0.1, 0.5)
    groups = {group["name"]: group for group in optimizer.param_groups}
    assert {name: len(group["params"]) for name, group in groups.items()} == {"sparse": 1, "dense": 1, "plain": 2}
    assert [groups[name]["lr"] for name in ("sparse", "dense", "plain")] == [0.05, 0.1, 0.1]
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    # A gradient of zero leaves the decay alone: 1 - rate * 0.1.
    assert module.matrix[0, 0].item() == pytest.approx(0.995)
    assert module.table[0, 0].item() == pytest.approx(0.99)
    assert (module.bigram[0, 0].item(), module.gain[0].item()) == (1.0, 1.0)


def test_what_stands_beside_projected_parameters_has_a_rate_of_its_own():
    module = parts()
    optimizer = make_optimizer(module, {"matrix": module.matrix})
    set_rate(optimizer, 0.1, 0.5, 0.2)
    rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
    assert rates == pytest.approx({"sparse": 0.05, "dense": 0.02, "plain": 0.02})
    alone = make_optimizer(module, {})
    set_rate(alone, 0.1, 0.5, 0.2)
    assert {group["lr"] for group in alone.param_groups} == {0.1}


def test_first_step_by_hand():
    module = nn.Module()
    module.gain = nn.Parameter(torch.tensor([1.0, 1.0]))
    optimizer = make_optimizer(module, {}, eps=0.1)
    set_rate(optimizer, 0.5, 1.0)
    module.gain.grad = torch.tensor([2.0, -0.1])
    optimizer.step()
    # The first moments, bias corrected, are g and g * g: the step is rate * g / (|g| + eps).
    expected = [1 - 0.5 * 2 / 2.1, 1 + 0.5 * 0.1 / 0.2]
    assert module.gain.tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("mode", "size", "expected"),
    [("normalize", 3.0, 1.0), ("normalize", 0.01, 1.0), ("clip", 3.0, 1.0), ("clip", 0.01, 0.01), ("off", 3.0, 3.0),
     ("normalize", 0.0, 0.0)],
)  # fmt: skip
def test_gradient_rms_over_all_parameters(mode, size, expected):
    module = parts()
    for parameter in (module.matrix, module.gain):
        parameter.grad = torch.full_like(parameter, size)
    module.matrix.grad[0] *= -1
    rms = float(gradient_norm(module.parameters())) / math.sqrt(6)
    assert rms == pytest.approx(size)
    scale_gradients_(module.parameters(), rms, mode)
    assert module.gain.grad.tolist() == pytest.approx([expected, expected])
    assert module.matrix.grad[0, 0].item() == pytest.approx(-expected)


def test_impossible_groups_are_refused():
    module = parts()
    with pytest.raises(ValueError, match="sparse: got 'other'"):
        make_optimizer(module, {"other": nn.Parameter(torch.ones(1))})
    with pytest.raises(ValueError, match="modules: no parameter is trainable"):
        make_optimizer(module.requires_grad_(False), {})

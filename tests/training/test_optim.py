"""Rates, groups and gradient scaling against arithmetic by hand."""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from distill.model import kernels, operations
from distill.training.optim import (
    ProjectedAdamW,
    gradient_norm,
    gradient_scale,
    make_optimizer,
    rate_factor,
    scale_gradients_,
    set_rate,
    sharkfin_factor,
)

torch.set_num_threads(1)


@pytest.fixture
def plain() -> Iterator[None]:
    operations.set_path("plain")
    yield
    operations.set_path("auto")


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


# --- steps that project ----------------------------------------------------------------------------------------------

FLOORS = {"mlp_in.weight": (2, 0), "mlp_out.weight": (2, 1)}


class Unit(nn.Module):
    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.mlp_in, self.mlp_out = nn.Linear(24, 60), nn.Linear(60, 24)
        self.bigram, self.gain = nn.Parameter(torch.zeros(9, 9)), nn.Parameter(torch.ones(24))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


def prepared(module: nn.Module) -> ProjectedAdamW:
    sparse = {name: p for name, p in module.named_parameters() if name.startswith("mlp")}
    optimizer = make_optimizer(module, sparse, floors=FLOORS)
    set_rate(optimizer, 0.05, 0.5)
    return optimizer


def advance(module: nn.Module, optimizer: ProjectedAdamW, steps: range) -> list[int]:
    """Steps on random gradients, annealing from 1 to 1/8; returns the non-zeros."""
    counts = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for parameter in module.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float32).to(parameter)
        optimizer.step(scale=0.5, fraction=max(1 / 8, 1 - step / 10))
        counts.append(optimizer.nonzeros)
    return counts


def same(one: nn.Module, other: nn.Module) -> None:
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=name)
        assert torch.equal(a != 0, b != 0), name


def test_a_compiled_training_is_a_plain_one():
    compiled, by_torch = Unit(), Unit()
    counts = advance(compiled, prepared(compiled), range(30))
    operations.set_path("plain")
    try:
        assert advance(by_torch, prepared(by_torch), range(30)) == counts
    finally:
        operations.set_path("auto")
    same(compiled, by_torch)
    least = 2 * round(24 * 60 / 8) + round(60 / 8) + round(24 / 8)
    assert counts[0] == 2 * 24 * 60 + 60 + 24 and least <= counts[-1] < 1.2 * least
    assert int((compiled.mlp_out.weight != 0).sum(0).min()) >= 2


def test_one_way_goes_on_where_the_other_stopped():
    whole, half = Unit(), Unit()
    advance(whole, prepared(whole), range(30))
    first = prepared(half)
    advance(half, first, range(15))
    operations.set_path("plain")
    try:
        second = prepared(half)
        second.load_state_dict(first.state_dict())
        advance(half, second, range(15, 20))
    finally:
        operations.set_path("auto")
    third = prepared(half)
    third.load_state_dict(second.state_dict())
    advance(half, third, range(20, 30))
    same(whole, half)
    assert set(third.state[half.gain]) == {"step", "exp_avg", "exp_avg_sq"}
    assert int(third.state[half.gain]["step"]) == 30


def test_a_new_optimiser_with_the_old_state_gives_the_same_bits():
    whole, half = Unit(), Unit()
    advance(whole, prepared(whole), range(30))
    first = prepared(half)
    advance(half, first, range(20))
    second = prepared(half)
    second.load_state_dict(first.state_dict())
    advance(half, second, range(20, 30))
    for a, b in zip(whole.parameters(), half.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_parameters_without_a_gradient_and_those_of_others(dtype):
    module = Unit().to(dtype)
    optimizer = prepared(module)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    module.mlp_in.weight.grad = torch.ones_like(module.mlp_in.weight)
    optimizer.step(fraction=0.25, without=[module.mlp_out.weight])
    kept = {name: int((p != 0).sum()) for name, p in module.named_parameters()}
    assert kept["mlp_in.bias"] == 15 and kept["mlp_out.bias"] == 6 and kept["mlp_in.weight"] >= 360
    assert torch.equal(module.mlp_out.weight, before["mlp_out.weight"])
    assert torch.equal(module.gain, before["gain"]) and torch.equal(module.bigram, before["bigram"])
    assert optimizer.nonzeros == kept["mlp_in.weight"] + kept["mlp_in.bias"] + kept["mlp_out.bias"]
    assert module.gain not in optimizer.state


def test_without_a_fraction_nothing_is_projected():
    module = Unit()
    optimizer = prepared(module)
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert all(int((p != 0).sum()) == p.numel() for p in module.parameters())
    assert optimizer.nonzeros == 2 * 24 * 60 + 60 + 24


def test_a_closure_is_refused():
    with pytest.raises(ValueError, match="closure: got one"):
        prepared(Unit()).step(lambda: 1.0)


def test_the_norm_is_the_same_either_way(plain):
    module = Unit()
    for parameter in module.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    by_torch = float(gradient_norm(module.parameters()))
    operations.set_path("auto")
    assert float(gradient_norm(module.parameters())) == pytest.approx(by_torch, rel=1e-6)
    assert gradient_scale(0.5, "clip") == 1.0 and gradient_scale(0.5, "normalize") == 2.0


def test_the_compiled_step_hands_its_pattern_on():
    if not kernels.available():
        pytest.skip("no compiler on this machine")
    module = nn.Module()
    module.mlp_in = nn.Linear(64, 64)
    optimizer = make_optimizer(module, {"weight": module.mlp_in.weight}, floors={"weight": (2, 0)})
    set_rate(optimizer, 0.05, 1.0)
    for step in range(3):
        module.mlp_in.weight.grad = torch.randn(64, 64, generator=torch.Generator().manual_seed(step))
        optimizer.step(fraction=0.1)
    pattern = kernels.Pattern.of(module.mlp_in.weight)
    assert pattern.by_row.numel() == optimizer.nonzeros == int(module.mlp_in.weight.count_nonzero())
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(9))
    expected = x @ module.mlp_in.weight.T
    torch.testing.assert_close(kernels.sparse_linear(x, module.mlp_in.weight), expected)

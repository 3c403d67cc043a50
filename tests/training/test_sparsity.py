"""The projection against a plain sort, the schedules and the report against arithmetic by hand."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from distill.model import kernels, operations
from distill.training.sparsity import (
    automatic_floor,
    kept_fraction,
    magnitude_threshold,
    project_,
    sparse_parameters,
    sparsity_report,
    unit_axis,
)

torch.set_num_threads(1)


def sorted_projection(weight: Tensor, fraction: float, floor: int = 0, axis: int | None = None) -> Tensor:
    """The definition, by stable sorts: the largest of the tensor, and the largest of each unit."""
    order = torch.sort(weight.abs().reshape(-1), descending=True, stable=True).indices
    kept = torch.zeros(weight.numel(), dtype=torch.bool)
    kept[order[: round(fraction * weight.numel())]] = True
    kept = kept.view(weight.shape)
    if floor and axis is not None:
        rows = weight.abs() if axis == 0 else weight.abs().T
        largest = torch.sort(rows, dim=1, descending=True, stable=True).indices[:, :floor]
        units = torch.zeros_like(rows, dtype=torch.bool).scatter_(1, largest, True)
        kept = kept | (units if axis == 0 else units.T)
    return torch.where(kept, weight, torch.zeros_like(weight))


def test_ties_go_to_the_lowest_index():
    weight = torch.tensor([[1.0, -2.0, 2.0], [2.0, 0.5, -2.0]])
    assert project_(weight, 0.5) == 3
    assert torch.equal(weight, torch.tensor([[0.0, -2.0, 2.0], [2.0, 0.0, 0.0]]))


def test_exactly_the_rounded_count_stays():
    weight = torch.randn(37, 53, generator=torch.Generator().manual_seed(0))
    for fraction in (1 / 64, 0.1, 0.5, 0.99):
        copy = weight.clone()
        assert project_(copy, fraction) == round(fraction * 37 * 53) == int((copy != 0).sum())


def test_no_more_than_the_non_zeros_stay():
    weight = torch.zeros(10, 10)
    weight[3, 4], weight[7, 1] = -1.0, 1e-40
    assert project_(weight, 0.5) == 2
    assert weight[7, 1] > 0
    assert project_(weight, 0.01) == 1
    assert weight[3, 4] == -1


def test_fraction_zero_and_one():
    weight = torch.tensor([1.0, 0.0, -3.0])
    assert project_(weight, 1.0) == 2
    assert weight.tolist() == [1.0, 0.0, -3.0]
    assert project_(weight, 0.0) == 0
    assert weight.tolist() == [0.0, 0.0, 0.0]


def test_floor_brings_back_the_largest_of_each_row_or_column():
    weight = torch.tensor([[9.0, 8.0, 7.0, 6.0], [1.0, -3.0, 2.0, 3.0]])
    by_row = weight.clone()
    assert project_(by_row, 0.5, floor=1, axis=0) == 5
    assert torch.equal(by_row, torch.tensor([[9.0, 8.0, 7.0, 6.0], [0.0, -3.0, 0.0, 0.0]]))
    by_column = weight.clone()
    assert project_(by_column, 0.25, floor=1, axis=1) == 4
    assert torch.equal(by_column, torch.tensor([[9.0, 8.0, 7.0, 6.0], [0.0, 0.0, 0.0, 0.0]]))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    levels=st.sampled_from([1, 3, 1000]),
    fraction=st.floats(0, 1),
    floor=st.integers(0, 3),
    axis=st.sampled_from([0, 1, None]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    turned=st.booleans(),
    path=st.sampled_from(operations.PATHS),
)
def test_projection_is_what_sorting_gives(seed, shape, levels, fraction, floor, axis, dtype, turned, path):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(-levels, levels + 1, shape, generator=generator).to(dtype)
    weight = weight.T if turned else weight
    floor = 0 if axis is None else min(floor, weight.shape[1 - axis])
    expected = sorted_projection(weight, fraction, floor, axis)
    operations.set_path(path)
    try:
        count = project_(weight, fraction, floor=floor, axis=axis)
    finally:
        operations.set_path("auto")
    assert torch.equal(weight, expected)
    assert count == int((expected != 0).sum())


@pytest.mark.parametrize("zeros", [0.0, 0.7, 0.999])
@pytest.mark.parametrize("fraction", [0.001, 1 / 64, 0.4])
def test_sampled_bound_of_large_tensors_is_exact(zeros, fraction):
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(300, 700, generator=generator)
    weight[torch.rand(300, 700, generator=generator) < zeros] = 0
    # All that the sample sees is small, so the guessed bound is far off.
    weight.view(-1)[::61] *= 1e-6
    expected = sorted_projection(weight, fraction)
    project_(weight, fraction)
    assert torch.equal(weight, expected)


def test_threshold_by_hand():
    magnitude = torch.tensor([[3.0, 1.0, 0.0], [1.0, 2.0, 1.0]])
    assert magnitude_threshold(magnitude, 0) == (math.inf, 0, 0)
    assert magnitude_threshold(magnitude, 2) == (2.0, 1, 1)
    assert magnitude_threshold(magnitude, 4) == (1.0, 2, 3)
    assert magnitude_threshold(magnitude, 6) == (0.0, 0, 0)


@pytest.mark.parametrize("count", [0, 1, 100, 900, 999, 1000])
def test_threshold_is_the_compiled_one(count):
    if not kernels.available():
        pytest.skip("no compiler on this machine")
    magnitude = torch.randint(0, 9, (1000,), generator=torch.Generator().manual_seed(2)).float()
    assert magnitude_threshold(magnitude, count) == kernels.magnitude_cut(magnitude, count)


def test_projecting_twice_changes_nothing():
    weight = torch.randn(64, 48, generator=torch.Generator().manual_seed(3))
    project_(weight, 0.05, floor=2, axis=0)
    once = weight.clone()
    assert project_(weight, 0.05, floor=2, axis=0) == int((once != 0).sum())
    assert torch.equal(weight, once)


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"fraction": 1.5}, "fraction"),
        ({"fraction": -0.1}, "fraction"),
        ({"fraction": 0.5, "floor": 4, "axis": 0}, "floor"),
        ({"fraction": 0.5, "floor": 1, "axis": None}, "floor"),
        ({"fraction": 0.5, "floor": -1, "axis": 1}, "floor"),
    ],
)
def test_impossible_projections_are_refused(arguments, field):
    with pytest.raises(ValueError, match=f"{field}: got"):
        project_(torch.ones(3, 3), **arguments)


def test_kept_fraction_by_hand():
    linear = {"steps": 100, "kept": 0.2, "anneal": "linear", "anneal_fraction": 0.5}
    assert [kept_fraction(step, **linear) for step in (0, 25, 50, 100)] == pytest.approx([1.0, 0.6, 0.2, 0.2])
    exponential = {**linear, "kept": 1 / 64, "anneal": "exponential"}
    assert [kept_fraction(step, **exponential) for step in (0, 25, 50)] == pytest.approx([1.0, 1 / 8, 1 / 64])
    fast = {**linear, "anneal": "fast", "steps": 1000}
    assert [kept_fraction(step, **fast) for step in (0, 25, 50, 999)] == pytest.approx([1.0, 0.6, 0.2, 0.2])
    assert kept_fraction(0, **{**linear, "anneal_fraction": 0.0}) == 0.2
    assert kept_fraction(50, **linear) == 0.2


def test_floor_by_hand():
    assert automatic_floor(1 / 64, 256) == 1
    assert automatic_floor(1 / 64, 2048) == 4
    assert automatic_floor(1 / 1000, 256) == 0
    assert automatic_floor(0.03, 400) == math.floor(0.03 * 100)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn_norm = nn.RMSNorm(2)
        self.attn_q, self.attn_k, self.attn_v, self.attn_out = (nn.Linear(2, 2) for _ in range(4))
        self.attn_sink = nn.Parameter(torch.zeros(1))
        self.mlp_in, self.mlp_out = nn.Linear(2, 4), nn.Linear(4, 2)


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.Embedding(3, 2)
        self.embed_positions = nn.Embedding(5, 2)
        self.layers = nn.ModuleList([Block()])
        self.final_norm = nn.LayerNorm(2)
        self.unembed = nn.Linear(2, 3, bias=False)
        self.bigram = nn.Parameter(torch.zeros(3, 3))


def test_what_is_projected():
    names = set(sparse_parameters(Tiny()))
    linears = ("attn_q", "attn_k", "attn_v", "attn_out", "mlp_in", "mlp_out")
    expected = {f"layers.0.{name}.{part}" for name in linears for part in ("weight", "bias")}
    assert names == expected | {"embed_tokens.weight", "embed_positions.weight", "unembed.weight"}
    frozen = Tiny()
    frozen.unembed.requires_grad_(False)
    assert "unembed.weight" not in sparse_parameters(frozen)


def test_unit_axis():
    assert unit_axis("student.layers.3.mlp_in.weight") == 0
    assert unit_axis("layers.0.attn_out.weight") == 1
    assert unit_axis("layers.0.attn_q.bias") is None
    assert unit_axis("embed_tokens.weight") is None
    assert unit_axis("bigram") is None


def test_report_counts_the_dead():
    model = Tiny()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
        layer = model.layers[0]
        layer.mlp_in.weight[0] = 0  # neuron 0 reads nothing
        layer.mlp_out.weight[:, 2] = 0  # neuron 2 writes nothing
        layer.attn_k.weight[1] = 0  # q-k pair 1 is dead, its bias notwithstanding
    report = sparsity_report(sparse_parameters(model))
    assert report["dead_neurons"] == 0.5
    assert report["dead_head_channels"] == 0.25
    assert report["dead_residual_channels"] == 0.0
    assert report["tensors"]["layers.0.mlp_in.weight"] == {"kept": 6, "numel": 8, "fraction": 0.75}
    numel = sum(parameter.numel() for parameter in sparse_parameters(model).values())
    assert (report["kept"], report["numel"]) == (numel - 6, numel)
    with torch.no_grad():
        for name in ("attn_q", "attn_k", "attn_v", "mlp_in"):
            getattr(layer, name).weight[:, 1] = 0
        model.unembed.weight[:, 1] = 0  # nothing reads channel 1 any more
    assert sparsity_report(sparse_parameters(model))["dead_residual_channels"] == 0.5


def test_report_of_other_modules_has_no_shares():
    report = sparsity_report({"0.weight": torch.eye(2), "1.bias": torch.zeros(2)})
    assert set(report) == {"tensors", "kept", "numel", "fraction"}
    assert report["fraction"] == pytest.approx(1 / 3)

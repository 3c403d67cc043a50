"""Maps trained on a sample of their entries: the gradient of just these, and the step that keeps the largest."""

from collections.abc import Iterator

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor

from distill.model import kernels
from distill.model.kernels import build
from distill.model.kernels.candidates import (
    Index,
    Sample,
    keep_largest_,
    sample_,
    sample_of,
    sampled_embedding,
    sampled_linear,
)
from distill.training.sparsity import project_

SEEDS = st.integers(0, 2**32 - 1)
WAYS = [pytest.param(False, id="torch"), pytest.param(True, id="compiled")]


@pytest.fixture(autouse=True)
def _compiled() -> None:
    if not kernels.available():
        pytest.skip("no compiler on this machine")


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """The number of threads of every kernel, however small the work."""
    monkeypatch.setattr(build, "PARALLEL_FROM", 0)
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def sparse(seed: int, *shape: int, share: float) -> Tensor:
    chosen = torch.rand(shape, generator=torch.Generator().manual_seed(seed + 1)) < share
    return draw(seed, *shape) * chosen


def places_of(seed: int, weight: Tensor, share: float) -> Tensor:
    """The non-zero entries and a share of the others."""
    more = torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed + 2)) < share
    return ((weight != 0) | more).reshape(-1).nonzero().reshape(-1)


def test_index_by_hand() -> None:
    index = Index.of(torch.tensor([0, 2, 3, 8]), 3, 3)  # (0, 0) (0, 2) (1, 0) (2, 2)
    assert index.start.tolist() == [0, 2, 3, 4]
    assert index.at.tolist() == [0, 2, 0, 2]
    assert index.panel_start.tolist() == [[0, 2], [2, 3], [3, 4]]


def test_index_has_panels() -> None:
    """Of 2048 columns each."""
    index = Index.of(torch.tensor([0, 2047, 2048, 2499, 2500, 4547, 4999]), 2, 2500)
    assert index.panel_start.tolist() == [[0, 2, 4], [4, 6, 7]]


def test_places_come_back() -> None:
    weight = sparse(0, 30, 50, share=0.1)
    places = places_of(0, weight, 0.2)
    for compiled in (False, True):
        sample = Sample.of(weight, places, compiled=compiled)
        assert torch.equal(sample.places(), places)
        assert torch.equal(sample.values, weight.reshape(-1)[places])


@settings(max_examples=30, deadline=None)
@given(
    SEEDS,
    st.integers(1, 600),
    st.integers(1, 90),
    st.one_of(st.integers(1, 300), st.integers(2040, 2100)),
    st.sampled_from([0.0, 0.02, 0.3, 1.0]),
    st.sampled_from([0.0, 0.25, 1.0]),
)
def test_linear_gradients(seed: int, tokens: int, o: int, i: int, share: float, filled: float) -> None:
    weight = sparse(seed, o, i, share=0.05)
    places = places_of(seed, weight, share)
    grad, bias = sparse(seed + 3, tokens, o, share=filled), draw(seed + 5, o)
    x = sparse(seed + 6, tokens, i, share=0.25)
    right = weight.double(), bias.double(), x.double(), grad.double()
    wanted = (right[3].T @ right[2]).reshape(-1)[places]
    for compiled in (False, True):
        sample = Sample.of(weight, places, compiled=compiled)
        leaf, parameter, b = x.clone().requires_grad_(), weight.clone().requires_grad_(), bias.clone().requires_grad_()
        out = sampled_linear(leaf, parameter, b, sample)
        assert torch.allclose(out.double(), F.linear(right[2], right[0], right[1]), atol=1e-4)
        out.backward(grad)
        assert parameter.grad is None and leaf.grad is not None and b.grad is not None
        assert torch.allclose(sample.gradient.double(), wanted, rtol=1e-4, atol=1e-4)
        assert torch.allclose(leaf.grad.double(), right[3] @ right[0], rtol=1e-4, atol=1e-4)
        assert torch.allclose(b.grad.double(), right[3].sum(0), rtol=1e-4, atol=1e-4)


def test_linear_gradient_is_the_same_on_any_number_of_threads(threads: int) -> None:
    weight = sparse(0, 300, 520, share=0.02)
    sample = Sample.of(weight, places_of(0, weight, 0.05), compiled=True)
    x, grad = sparse(1, 4, 70, 520, share=0.3), sparse(2, 4, 70, 300, share=0.25)
    sampled_linear(x, weight.requires_grad_(), None, sample).backward(grad)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "PARALLEL_FROM", 1 << 60)
        alone = Sample.of(weight, sample.places(), compiled=True)
        sampled_linear(x, weight, None, alone).backward(grad)
    assert torch.equal(sample.gradient, alone.gradient)
    dense = torch.einsum("bto,bti->oi", grad.double(), x.double()).reshape(-1)[sample.places()]
    assert float((sample.gradient - dense).norm() / dense.norm()) < 1e-6


@pytest.mark.parametrize("compiled", WAYS)
def test_gradients_add_up(compiled: bool) -> None:
    weight = sparse(0, 20, 30, share=0.2).requires_grad_()
    sample = Sample.of(weight, places_of(0, weight.detach(), 0.1), compiled=compiled)
    x, ids = draw(1, 7, 30).requires_grad_(), torch.tensor([[3, 19, 3]])
    (sampled_linear(x, weight, None, sample).sum() + sampled_embedding(ids, weight, sample).pow(2).sum()).backward()
    dense = weight.detach().clone().requires_grad_()
    (F.linear(x.detach(), dense).sum() + F.embedding(ids, dense).pow(2).sum()).backward()
    assert dense.grad is not None
    assert torch.allclose(sample.gradient, dense.grad.view(-1)[sample.places()], atol=1e-5)
    sample.clear_()
    assert not sample.gradient.any()


@pytest.mark.parametrize("compiled", WAYS)
def test_embedding_needs_no_gradient_of_its_input(compiled: bool) -> None:
    weight = sparse(0, 9, 5, share=0.5).requires_grad_()
    sample = Sample.of(weight, torch.arange(45), compiled=compiled)
    ids = torch.tensor([8, 0, 8])
    out = sampled_embedding(ids, weight, sample)
    assert torch.equal(out, weight[ids])
    grad = draw(1, 3, 5)
    out.backward(grad)
    wanted = torch.zeros(9, 5)
    wanted[0], wanted[8] = grad[1], grad[0] + grad[2]
    assert torch.equal(sample.gradient.view(9, 5), wanted) and weight.grad is None


def test_under_autocast_the_plain_way_is_taken() -> None:
    weight = sparse(0, 20, 40, share=0.2).requires_grad_()
    sample = Sample.of(weight, places_of(0, weight.detach(), 0.1), compiled=True)
    x, grad = draw(1, 6, 40).requires_grad_(), draw(2, 6, 20)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = sampled_linear(x, weight, None, sample)
    assert out.dtype == torch.bfloat16
    out.backward(grad.bfloat16())
    dense = (grad.T @ x.detach()).reshape(-1)[sample.places()]
    assert float((sample.gradient - dense).norm() / dense.norm()) < 0.02
    assert x.grad is not None and float((x.grad - grad @ weight.detach()).norm() / x.grad.norm()) < 0.02


def test_a_sample_is_attached_where_gradients_are_recorded() -> None:
    weight, other = torch.zeros(4, 4, requires_grad=True), torch.zeros(4, 4, requires_grad=True)
    sample = Sample.of(weight, torch.arange(3), compiled=False)
    assert sample_of(weight) is None
    sample_(weight, sample)
    assert sample_of(weight) is sample and sample_of(other) is None
    with torch.no_grad():
        assert sample_of(weight) is None
    weight.requires_grad_(False)
    assert sample_of(weight) is None
    weight.requires_grad_(True)
    sample_(weight, None)
    assert sample_of(weight) is None


@pytest.mark.parametrize("compiled", WAYS)
def test_squares_by_hand(compiled: bool) -> None:
    weight = torch.tensor([[0.0, 2.0], [0.0, -1.0]])
    sample = Sample.of(weight, torch.tensor([0, 1, 3]), compiled=compiled)
    sample.gradient.copy_(torch.tensor([3.0, 1.0, -2.0]))
    everything, kept = sample.squares()
    assert float(everything) == 14.0 and float(kept) == 5.0


@settings(max_examples=60, deadline=None)
@given(
    SEEDS,
    st.integers(1, 40),
    st.integers(1, 60),
    st.sampled_from([0.05, 0.3, 1.0]),
    st.floats(0, 1),
    st.integers(0, 5),
    st.sampled_from([0, 1]),
    st.booleans(),
)
def test_keeps_what_the_projection_keeps(
    seed: int, rows: int, columns: int, more: float, kept: float, floor: int, axis: int, tied: bool
) -> None:
    weight = torch.nn.Parameter(sparse(seed, rows, columns, share=0.2))
    sample = Sample.of(weight, places_of(seed, weight.detach(), more), compiled=True)
    moved = sample.values + draw(seed + 9, *sample.values.shape)
    sample.values.copy_((2 * moved).round() / 2 if tied else moved)
    wanted = torch.zeros(rows * columns)
    wanted[sample.places()] = sample.values
    wanted = wanted.view(rows, columns)
    floor = min(floor, (columns, rows)[axis])
    count = round(kept * sample.values.numel())
    project_(wanted, count / weight.numel(), floor=floor, axis=axis if floor else None)
    before = weight._version
    left = keep_largest_(sample, weight, count, floor=floor, axis=axis if floor else None)
    assert torch.equal(weight.detach(), wanted) and left == int(wanted.count_nonzero())
    assert weight._version > before
    known, fresh = kernels.Pattern.of(weight), kernels.Pattern.of(wanted)
    for name in ("row_start", "by_row", "column_start", "by_column"):
        assert torch.equal(getattr(known, name), getattr(fresh, name)), name
    assert torch.equal(sample.values, wanted.reshape(-1)[sample.places()])


def test_keeping_on_threads(threads: int) -> None:
    weight = torch.nn.Parameter(sparse(0, 200, 300, share=0.05))
    sample = Sample.of(weight, places_of(0, weight.detach(), 0.1), compiled=True)
    sample.values.add_(draw(1, *sample.values.shape))
    wanted = torch.zeros(200 * 300)
    wanted[sample.places()] = sample.values
    project_(wanted.view(200, 300), 0.03)
    keep_largest_(sample, weight, 1800)
    assert torch.equal(weight.detach().view(-1), wanted)
    assert torch.equal(kernels.Pattern.of(weight).by_column, kernels.Pattern.of(wanted.view(200, 300)).by_column)

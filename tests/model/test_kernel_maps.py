"""Linear maps, norms and what follows them, compiled, against plain torch and float64."""

import math
from collections.abc import Sequence

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor

from distill.model import kernels
from distill.model.kernels import build
from distill.model.kernels.linear import Gradient
from distill.model.operations import ACTIVATIONS, norm_scale, scaled
from distill.model.topk import top_mask

SEEDS = st.integers(0, 2**32 - 1)
Maps = list[tuple[Tensor, Tensor | None]]


@pytest.fixture(autouse=True)
def _compiled() -> None:
    if not kernels.available():
        pytest.skip("no compiler on this machine")


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def sparse(seed: int, *shape: int, density: float) -> Tensor:
    chosen = torch.rand(shape, generator=torch.Generator().manual_seed(seed + 1)) < density
    return draw(seed, *shape) * chosen


def close(found: Tensor | None, expected: Tensor | None) -> None:
    assert found is not None and expected is not None and found.shape == expected.shape
    found, expected = found.detach(), expected.detach()
    size = max(1e-3, float(expected.abs().max())) if expected.numel() else 1.0
    torch.testing.assert_close(found.double(), expected.double(), rtol=1e-4, atol=1e-4 * size)


def kept_are_largest(out: Tensor, before: Tensor, k: int) -> None:
    """As many entries are kept as there should be, and none that was dropped is larger, but for rounding."""
    kept = out != 0
    # Far below zero a gelu is zero in one way of working it out and next to nothing in another.
    assert bool((kept.sum(-1) <= k).all())
    assert bool((kept.sum(-1) >= (before.abs() > 1e-6).sum(-1).clamp(max=k)).all())
    least = before.abs().masked_fill(~kept, math.inf).amin(-1)
    most = before.abs().masked_fill(kept, 0).amax(-1)
    assert bool((most <= least * (1 + 1e-4) + 1e-6).all())


def same_maps(
    x: Tensor, maps: Maps, keep: Sequence[int | None], activation: str, ways: Sequence[bool], grads: Sequence[Tensor]
) -> None:
    """Outputs and gradients are those of float64, with the choice of AbsTopK taken over."""
    leaves = [
        x.detach().requires_grad_(),
        *(t.detach().requires_grad_() for pair in maps for t in pair if t is not None),
    ]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    found, wanted = ([], [])
    for inputs, result in ((leaves, found), (exact, wanted)):
        rest = iter(inputs[1:])
        result.extend((next(rest), None if bias is None else next(rest)) for _, bias in maps)
    outs = kernels.linear_maps(leaves[0], found, sparse=ways, keep=keep, activation=activation)
    torch.autograd.backward(outs, list(grads))
    expected = []
    for out, (weight, bias), k in zip(outs, wanted, keep, strict=True):
        before = ACTIVATIONS[activation](F.linear(exact[0], weight, bias))
        if k is not None and k < out.shape[-1]:
            kept_are_largest(out.detach(), before.detach().float(), k)
            before = before * (out.detach() != 0)
        close(out, before)
        expected.append(before)
    torch.autograd.backward(expected, [grad.double() for grad in grads])
    for one, other in zip(leaves, exact, strict=True):
        close(one.grad, other.grad)
    with torch.no_grad():  # what records nothing computes the same
        again = kernels.linear_maps(leaves[0], found, sparse=ways, keep=keep, activation=activation)
    assert all(torch.equal(one, other) for one, other in zip(outs, again, strict=True))


@settings(max_examples=80, deadline=None)
@given(
    SEEDS,
    st.integers(1, 150),
    st.integers(2, 150),
    st.lists(st.integers(2, 200), min_size=1, max_size=3),
    st.sampled_from([0.0, 0.02, 0.1, 0.5, 1.0]),
    st.sampled_from([None, 0.1, 0.25, 0.9]),
    st.sampled_from(sorted(ACTIVATIONS)),
    st.sampled_from([0.0, 0.3, 1.0]),
    st.integers(0, 7),
)
def test_maps_are_product_activation_and_topk(
    seed: int,
    n: int,
    i: int,
    rows: list[int],
    density: float,
    share: float | None,
    activation: str,
    filled: float,
    bits: int,
) -> None:
    x = draw(seed, n, i)
    maps: Maps = [
        (sparse(seed + 7 * m, o, i, density=density), draw(seed + 7 * m + 3, o) if bits >> m & 1 else None)
        for m, o in enumerate(rows)
    ]
    keep = [None if share is None else max(1, int(share * o)) for o in rows]
    ways = [bool(bits >> m & 2) for m in range(len(rows))]
    grads = [sparse(seed + 7 * m + 5, n, o, density=filled) for m, o in enumerate(rows)]
    same_maps(x, maps, keep, activation, ways, grads)


def test_maps_threads_and_views(threads: int) -> None:
    maps: Maps = [(sparse(m, 70 + m, 300, density=0.1), draw(m, 70 + m)) for m in range(3)]
    x = draw(9, 5, 71, 300)
    grads = [draw(10 + m, 5, 71, 70 + m) for m in range(3)]
    for ways in ([True] * 3, [False, True, False]):
        same_maps(x, maps, [17, None, 30], "gelu", ways, grads)
        same_maps(x.transpose(0, 1), maps, [17, 90, 30], "identity", ways, [g.transpose(0, 1) for g in grads])
        same_maps(x[:, ::3], maps, [1, 2, 3], "relu", ways, [g[:, ::3] for g in grads])
    turned: Maps = [(maps[0][0].T, None)]
    same_maps(draw(20, 333, 70), turned, [75], "gelu_new", [True], [draw(21, 1, 300).expand(333, 300)])


def test_maps_give_the_same_bits_on_any_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "PARALLEL_FROM", 0)
    weights = [sparse(m, 90, 260, density=0.1) for m in range(2)]
    results = []
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        for tokens in (20, 333):
            leaves = [t.clone().requires_grad_() for t in (draw(1, tokens, 260), *weights)]
            maps: Maps = [(weight, None) for weight in leaves[1:]]
            outs = kernels.linear_maps(leaves[0], maps, sparse=[True, True], keep=[22, 22], activation="gelu")
            torch.autograd.backward(outs, [draw(2, tokens, 90)] * 2)
            results.append([*outs, *(leaf.grad for leaf in leaves)])
    torch.set_num_threads(1)
    for first, *others in (results[::2], results[1::2]):
        for other in others:
            assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@settings(max_examples=30, deadline=None)
@given(SEEDS, st.integers(1, 40), st.integers(2, 140), st.integers(1, 140))
def test_ties_and_zeros_behind_a_map_are_broken_as_plainly(seed: int, n: int, o: int, k: int) -> None:
    # Whole numbers: products are exact, many are equal, and many are zero.
    x, weight = draw(seed, n, 12).round(), sparse(seed + 1, o, 12, density=0.2).round()
    plain = F.linear(x, weight)
    for way in (True, False):
        (out,) = kernels.linear_maps(x, [(weight, None)], sparse=[way], keep=[k])
        assert torch.equal(out, plain * top_mask(plain, k) if k < o else plain)


@pytest.mark.parametrize("way", [True, False])
def test_a_nan_goes_through_maps(way: bool) -> None:
    x, weight = draw(0, 3, 40), torch.eye(40)
    x[1, 2] = math.nan
    for activation in ACTIVATIONS:
        (out,) = kernels.linear_maps(x, [(weight, None)], sparse=[way], keep=[4], activation=activation)
        assert out[1, 2].isnan() and not out[::2].isnan().any()
        assert way is False or int(out[1].isnan().sum()) == 1


def test_maps_skip_what_needs_no_gradient() -> None:
    weight, bias, x, grad = sparse(0, 40, 50, density=0.1), draw(3, 40), draw(1, 30, 50), draw(2, 30, 40)
    for way in (True, False):
        for chosen in range(1, 8):
            leaves = [t.clone().requires_grad_(bool(chosen >> place & 1)) for place, t in enumerate((x, weight, bias))]
            (out,) = kernels.linear_maps(leaves[0], [(leaves[1], leaves[2])], sparse=[way], keep=[10])
            out.backward(grad)
            masked = grad.double() * (out.detach() != 0)
            wanted = (masked @ weight.double(), masked.T @ x.double(), masked.sum(0))
            for leaf, expected in zip(leaves, wanted, strict=True):
                assert (leaf.grad is not None) == leaf.requires_grad
                if leaf.requires_grad:
                    close(leaf.grad, expected)
    assert kernels.linear_maps(x[:0], [(weight, bias)], sparse=[True], keep=[3])[0].shape == (0, 40)


def test_a_sink_takes_the_place_of_a_weights_gradient() -> None:
    weight, x = sparse(0, 40, 50, density=0.1).requires_grad_(), draw(1, 130, 50).requires_grad_()
    taken: list[tuple[Gradient, Tensor]] = []
    sinks = [lambda gradient, read: taken.append((gradient, gradient.weight(read)))]
    (out,) = kernels.linear_maps(x, [(weight, None)], sparse=[True], keep=[10], sinks=sinks)
    grad = draw(2, 130, 40)
    out.backward(grad)
    ((gradient, dense),) = taken
    masked = grad.double() * (out.detach() != 0)
    assert weight.grad is None and (gradient.rows, gradient.tokens) == (40, 130)
    close(dense, masked.T @ x.detach().double())
    close(x.grad, masked @ weight.detach().double())


def test_an_output_that_is_not_used_has_no_gradient() -> None:
    weights = [sparse(m, 40, 50, density=0.2).requires_grad_() for m in range(2)]
    x = draw(5, 20, 50).requires_grad_()
    one, _ = kernels.linear_maps(x, [(weight, None) for weight in weights], sparse=[True, False], keep=[9, 9])
    one.sum().backward()
    close(weights[1].grad, torch.zeros(40, 50))
    close(x.grad, (one.detach() != 0).double() @ weights[0].detach().double())


def test_density_is_counted_again_after_a_change() -> None:
    weight = torch.nn.Parameter(torch.tensor([[0.0, 2.0, 0.0, 1.0], [-0.0, 0.0, 3.0, 0.0]]))
    assert kernels.density(weight) == 3 / 8 == kernels.Pattern.of(weight).density
    with torch.no_grad():
        weight[0, 0] = 5.0
    assert kernels.density(weight) == 0.5
    with torch.inference_mode():
        assert kernels.density(torch.eye(4)) == 0.25


def test_a_pattern_can_be_given() -> None:
    weight = torch.nn.Parameter(torch.tensor([[0.0, 2.0], [3.0, 0.0], [0.0, 4.0]]))
    made = kernels.Pattern.of(weight)
    with torch.no_grad():
        weight.mul_(10)
    parts = (made.row_start, made.by_row, made.column_start, made.by_column)
    told = kernels.Pattern.remember(weight, *parts)
    assert kernels.Pattern.of(weight) is told and told.density == 0.5 == kernels.density(weight)
    assert kernels.sparse_linear(torch.ones(1, 2), weight).tolist() == [[2.0, 3.0, 4.0]]  # of the pattern
    with torch.no_grad():
        weight.mul_(1)
    assert kernels.sparse_linear(torch.ones(1, 2), weight).tolist() == [[20.0, 30.0, 40.0]]


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "relu"])
def test_activations_and_their_slopes(activation: str) -> None:
    x = torch.cat([torch.linspace(-12, 12, 4001), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 60.0, -60.0])])[:, None]
    weight = torch.ones(1, 1)
    leaf, exact = x.clone().requires_grad_(), x.double().requires_grad_()
    (out,) = kernels.linear_maps(leaf, [(weight, None)], sparse=[True], keep=[None], activation=activation)
    expected = ACTIVATIONS[activation](exact)
    out.sum().backward()
    expected.sum().backward()
    assert leaf.grad is not None and exact.grad is not None
    torch.testing.assert_close(out.double(), expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=1e-6, atol=5e-7)


# --- norms -----------------------------------------------------------------------------------------------------------


def same_norm(
    x: Tensor, gain: Tensor, bias: Tensor | None, center: bool, eps: float, k: int | None, grad: Tensor
) -> None:
    inputs = [None if t is None else t.detach().requires_grad_() for t in (x, gain, bias)]
    exact = [None if t is None else t.detach().double().requires_grad_() for t in (x, gain, bias)]
    leaf, gains, biases = inputs
    assert leaf is not None and gains is not None and exact[0] is not None and exact[1] is not None
    out = kernels.norm_topk(leaf, gains, biases, center=center, eps=eps, k=k)
    before = scaled(exact[0], norm_scale(exact[0], center=center, eps=eps), exact[1], exact[2], center=center)
    if k is not None and k < x.shape[-1]:
        kept_are_largest(out.detach(), before.detach().float(), k)
        before = before * (out.detach() != 0)
    close(out, before)
    out.backward(grad)
    before.backward(grad.double())
    for one, other in zip(inputs, exact, strict=True):
        if one is not None:
            close(one.grad, None if other is None else other.grad)
    with torch.no_grad():
        assert torch.equal(kernels.norm_topk(leaf, gains, biases, center=center, eps=eps, k=k), out)


@settings(max_examples=60, deadline=None)
@given(
    SEEDS,
    st.integers(1, 150),
    st.integers(8, 200),  # a centred pair has no gradient but rounding
    st.booleans(),
    st.booleans(),
    st.sampled_from([1e-5, 1e-2]),
    st.sampled_from([None, 0.1, 0.25, 1.0]),
    st.sampled_from([1e-3, 1.0, 100.0]),
)
def test_norms_are_the_plain_ones(
    seed: int, n: int, width: int, center: bool, with_bias: bool, eps: float, share: float | None, size: float
) -> None:
    x, grad = size * (draw(seed, n, width) + center), draw(seed + 2, n, width)
    k = None if share is None else max(1, int(share * width))
    same_norm(x, draw(seed + 1, width), draw(seed + 3, width) if with_bias else None, center, eps, k, grad)


def test_norm_threads_and_views(threads: int) -> None:
    x, grad, gain = draw(0, 6, 80, 67), draw(1, 6, 80, 67), draw(2, 67)
    same_norm(x, gain, None, False, 1e-5, 16, grad)
    same_norm(x.transpose(0, 1), gain, draw(3, 67), True, 1e-5, 16, grad.transpose(0, 1))
    same_norm(x[:, ::2], draw(2, 134)[::2], None, True, 1e-5, None, grad[:, ::2])
    same_norm(draw(4, 1, 67).expand(300, 67), gain, None, False, 1e-5, 5, draw(5, 1, 1).expand(300, 67))


def test_norm_of_nothing_is_nothing() -> None:
    x = torch.zeros(2, 33, requires_grad=True)
    out = kernels.norm_topk(x, torch.ones(33), None, center=False, eps=1e-4, k=8)
    out.sum().backward()
    assert not out.any() and x.grad is not None and not x.grad.any()
    assert kernels.norm_topk(x[:0], torch.ones(33), None, center=False, eps=1e-4, k=8).shape == (0, 33)


def test_norm_of_nan_is_nan() -> None:
    x = draw(0, 3, 20)
    x[1, 4] = math.nan
    out = kernels.norm_topk(x, torch.ones(20), None, center=False, eps=1e-5, k=5)
    assert out[1].isnan().any() and not out[0].isnan().any() and not out[2].isnan().any()


# --- logits ----------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(SEEDS, st.integers(1, 80), st.integers(1, 200), st.floats(0.1, 50.0), st.booleans())
def test_cross_entropy_is_the_plain_one(seed: int, n: int, width: int, size: float, with_gaps: bool) -> None:
    logits = (size * draw(seed, n, width)).requires_grad_()
    targets = torch.randint(0, width, (n,), generator=torch.Generator().manual_seed(seed))
    if with_gaps:
        targets[torch.arange(n) % 3 == 1] = -100
    exact = logits.detach().double().requires_grad_()
    loss, wanted = kernels.cross_entropy(logits, targets), F.cross_entropy(exact, targets)
    (3 * loss).backward()
    (3 * wanted).backward()
    close(loss, wanted)
    close(logits.grad, exact.grad)
    assert torch.equal(kernels.cross_entropy(logits.detach(), targets), loss)


def test_cross_entropy_by_hand(threads: int) -> None:
    logits = torch.tensor([[0.0, math.log(3.0)], [5.0, 5.0]], requires_grad=True)
    loss = kernels.cross_entropy(logits, torch.tensor([1, 0]))
    loss.backward()
    assert loss.item() == pytest.approx((math.log(4 / 3) + math.log(2)) / 2)
    assert logits.grad is not None
    assert logits.grad.flatten().tolist() == pytest.approx([1 / 8, -1 / 8, -1 / 4, 1 / 4])
    assert kernels.cross_entropy(logits, torch.tensor([-1, -1])).isnan()
    infinite = torch.tensor([[0.0, -math.inf], [math.nan, 0.0]])
    assert kernels.cross_entropy(infinite[:1], torch.tensor([0])).item() == 0.0
    assert kernels.cross_entropy(infinite, torch.tensor([0, 1])).isnan()


@settings(max_examples=30, deadline=None)
@given(SEEDS, st.integers(1, 200), st.integers(1, 150), st.integers(1, 70))
def test_rows_of_a_table(seed: int, n: int, rows: int, width: int) -> None:
    ids = torch.randint(0, rows, (n,), generator=torch.Generator().manual_seed(seed))
    table, x, grad = draw(seed, rows, width), draw(seed + 1, n, width), draw(seed + 2, n, width)
    for plain, compiled in (
        (lambda t, y: F.embedding(ids, t), lambda t, y: kernels.embedding(t, ids)),
        (lambda t, y: y + F.embedding(ids, t), lambda t, y: kernels.add_rows_(1 * y, t, ids)),
    ):
        found, wanted = ([t.clone().requires_grad_() for t in (table, x)] for _ in range(2))
        out = compiled(*found)
        assert torch.equal(out, plain(*wanted))
        out.backward(grad)
        plain(*wanted).backward(grad)
        close(found[0].grad, wanted[0].grad)
        assert (found[1].grad is None) == (wanted[1].grad is None)
        if wanted[1].grad is not None:
            close(found[1].grad, wanted[1].grad)


def test_rows_threads_and_views(threads: int) -> None:
    ids = torch.randint(0, 130, (40, 3), generator=torch.Generator().manual_seed(0))[::2]
    table = draw(0, 130, 33).requires_grad_()
    kernels.embedding(table, ids).backward(draw(1, 3, 20, 33).transpose(0, 1))
    expected = torch.zeros(130, 33, dtype=torch.float64)
    expected.index_add_(0, ids.flatten(), draw(1, 3, 20, 33).transpose(0, 1).flatten(0, 1).double())
    close(table.grad, expected)
    x = draw(2, 20, 3, 33)
    assert torch.equal(kernels.add_rows_(x.clone(), table.detach(), ids), x + table.detach()[ids])

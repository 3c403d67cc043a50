"""Every compiled operation against the plain one."""

import math
from collections.abc import Iterator

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor

from distill.model import kernels
from distill.model.kernels import build
from distill.model.operations import attention_pattern, visible
from distill.model.topk import top_mask

SEEDS = st.integers(0, 2**32 - 1)


@pytest.fixture(autouse=True)
def _compiled() -> None:
    if not kernels.available():
        pytest.skip("no compiler on this machine")


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- AbsTopK ---------------------------------------------------------------------------------------------------------


def same_topk(x: Tensor, k: int) -> None:
    leaf = x.clone().requires_grad_()
    grad, mask = draw(1, *x.shape), top_mask(x, k)
    out = kernels.abs_topk(leaf, k)
    assert torch.equal(out, x * mask)
    out.backward(grad)
    assert leaf.grad is not None and torch.equal(leaf.grad, grad * mask)


@settings(max_examples=60, deadline=None)
@given(
    SEEDS,
    st.integers(1, 40),
    st.integers(2, 300),
    st.floats(0.0, 1.0),
    st.sampled_from(["normal", "rounded", "few", "equal", "tiny", "huge"]),
)
def test_topk_is_the_plain_one(seed: int, rows: int, width: int, share: float, kind: str) -> None:
    x = draw(seed, rows, width)
    x = {
        "normal": x,
        "rounded": (2 * x).round() / 2,  # many ties, many zeros of both signs
        "few": x * (draw(seed + 1, rows, width) > 1.3),
        "equal": x.sign(),
        "tiny": x * 1e-42,  # denormal
        "huge": torch.exp(15 * x),
    }[kind]
    same_topk(x, min(max(1, round(share * width)), width - 1))


def test_topk_threads_and_views(threads: int) -> None:
    x = draw(0, 300, 6, 67)
    same_topk(x, 9)
    same_topk(x[:, ::2, 1:], 9)
    same_topk(x.transpose(0, 2), 50)
    expanded = draw(1, 1, 67).expand(40, 67)
    same_topk(expanded, 5)
    assert torch.equal(kernels.abs_topk(expanded, 67), expanded)
    assert kernels.abs_topk(x[:0], 9).shape == (0, 6, 67)


def test_topk_by_hand() -> None:
    x = torch.tensor([[1.0, -2.0, 2.0, 0.0, 2.0], [0.0, -0.0, 1e-45, 0.0, 0.0]])
    assert kernels.abs_topk(x, 2).tolist() == [[0.0, -2.0, 2.0, 0.0, 0.0], [0.0, 0.0, pytest.approx(1e-45), 0.0, 0.0]]


def test_topk_lets_nan_and_infinity_through() -> None:
    x = draw(0, 3, 100)
    x[0, 7] = x[1, 3] = x[1, 4] = x[1, 99] = math.nan
    x[2, 50] = -math.inf
    out = kernels.abs_topk(x, 2)
    assert out[0].isnan().nonzero().tolist() == [[7]] and (out[0] != 0).sum() == 2
    assert out[1].isnan().nonzero().tolist() == [[3], [4]]
    assert out[2, 50] == -math.inf and (out[2] != 0).sum() == 2


def test_topk_of_a_broadcast_gradient() -> None:
    x = draw(0, 8, 33).requires_grad_()
    out = kernels.abs_topk(x, 4)
    out.sum().backward()
    assert x.grad is not None and torch.equal(x.grad, (out != 0).float())


def test_topk_refuses_no_channel() -> None:
    with pytest.raises(ValueError, match="k: 0 channels"):
        kernels.abs_topk(draw(0, 2, 8), 0)


# --- sparse linear ---------------------------------------------------------------------------------------------------


def sparse(seed: int, *shape: int, density: float) -> Tensor:
    chosen = torch.rand(shape, generator=torch.Generator().manual_seed(seed + 1)) < density
    return draw(seed, *shape) * chosen


def close(found: Tensor | None, expected: Tensor) -> None:
    assert found is not None and found.shape == expected.shape
    found, expected = found.detach(), expected.detach()
    assert torch.allclose(found.double(), expected, rtol=1e-4, atol=1e-4 * max(1.0, float(expected.abs().max())))


def linear_as_float64(x: Tensor, weight: Tensor, bias: Tensor | None, grad: Tensor) -> None:
    x, weight = (t.detach().requires_grad_() for t in (x, weight))
    bias = None if bias is None else bias.detach().requires_grad_()
    out = kernels.sparse_linear(x, weight, bias)
    out.backward(grad)
    exact = [None if t is None else t.detach().double().requires_grad_() for t in (x, weight, bias)]
    expected = F.linear(*exact)  # pyright: ignore[reportArgumentType]
    expected.backward(grad.double())
    close(out, expected)
    for found, wanted in zip((x, weight, bias), exact, strict=True):
        if found is not None:
            assert wanted is not None and wanted.grad is not None
            close(found.grad, wanted.grad)


@settings(max_examples=60, deadline=None)
@given(
    SEEDS,
    st.integers(1, 200),
    st.integers(1, 150),
    st.integers(1, 290),
    st.sampled_from([0.0, 0.01, 0.1, 0.5, 1.0]),
    st.sampled_from([0.0, 0.1, 0.3, 1.0]),
    st.booleans(),
)
def test_sparse_linear_is_the_product(
    seed: int, n: int, o: int, i: int, density: float, filled: float, with_bias: bool
) -> None:
    bias = draw(seed + 3, o) if with_bias else None
    linear_as_float64(
        draw(seed, n, i), sparse(seed + 1, o, i, density=density), bias, sparse(seed + 2, n, o, density=filled)
    )


def test_sparse_linear_threads_and_views(threads: int) -> None:
    weight, bias = sparse(0, 300, 70, density=0.1), draw(2, 300)
    x, grad = draw(3, 5, 71, 70), sparse(4, 5, 71, 300, density=0.25)
    linear_as_float64(x, weight, bias, grad)
    linear_as_float64(x.transpose(0, 1), weight, bias[::1], grad.transpose(0, 1))
    linear_as_float64(x[:, ::3], weight, bias, grad[:, ::3])
    linear_as_float64(draw(5, 70, 400).T, weight, None, draw(6, 1, 300).expand(400, 300))
    linear_as_float64(draw(7, 333, 300), weight.T, None, sparse(8, 333, 70, density=0.25))


def test_sparse_linear_gives_the_same_bits_on_any_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "PARALLEL_FROM", 0)
    weight, x, grad = sparse(0, 90, 260, density=0.1), draw(1, 333, 260), sparse(2, 333, 90, density=0.25)
    results = []
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        inputs = [t.clone().requires_grad_() for t in (x, weight)]
        out = kernels.sparse_linear(*inputs)
        out.backward(grad)
        results.append([out.detach(), *(t.grad for t in inputs)])
    torch.set_num_threads(1)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_sparse_linear_skips_what_needs_no_gradient() -> None:
    weight, x, grad = sparse(0, 40, 50, density=0.1), draw(1, 30, 50), draw(2, 30, 40)
    x.requires_grad_()
    bias = draw(3, 40).requires_grad_()
    kernels.sparse_linear(x, weight, bias).backward(grad)
    close(x.grad, grad.double() @ weight.double())
    close(bias.grad, grad.double().sum(0))
    assert weight.grad is None
    assert not kernels.sparse_linear(x.detach(), weight, None).requires_grad
    assert kernels.sparse_linear(x[:0], weight, None).shape == (0, 40)


def test_pattern_follows_changes_in_place() -> None:
    weight = torch.tensor([[0.0, 2.0, 0.0], [-0.0, 0.0, 3.0]])
    x = torch.ones(1, 3)
    pattern = kernels.Pattern.of(weight)
    assert pattern.density == pytest.approx(2 / 6) and kernels.Pattern.of(weight) is pattern
    assert pattern.row_start.tolist() == [0, 1, 2] and pattern.column_start.tolist() == [0, 0, 1, 2]
    assert kernels.sparse_linear(x, weight).tolist() == [[2.0, 3.0]]
    weight[0, 0] = 5.0
    assert kernels.sparse_linear(x, weight).tolist() == [[7.0, 3.0]]
    # Memory used again by another tensor, which counts its changes from zero, is no reason to take the old pattern.
    for value in (1.0, 4.0, 9.0):
        assert kernels.sparse_linear(x, torch.full((2, 3), value)).tolist() == [[3 * value, 3 * value]]


def test_backward_uses_the_weight_of_the_forward() -> None:
    weight = torch.eye(3).requires_grad_()
    x = torch.ones(2, 3, requires_grad=True)
    out = kernels.sparse_linear(x, weight)
    with torch.no_grad():
        weight.mul_(7)
    out.sum().backward()
    assert x.grad is not None and x.grad.tolist() == [[1.0] * 3] * 2


@settings(max_examples=20, deadline=None)
@given(SEEDS, st.integers(1, 200), st.sampled_from([0.0, 0.25, 1.0]))
def test_weight_gradient_is_the_product(seed: int, n: int, filled: float) -> None:
    grad, x = sparse(seed, n, 37, density=filled), draw(seed + 2, n, 75)
    weight, bias = kernels.weight_gradient(grad, x)
    close(weight, grad.double().T @ x.double())
    close(bias, grad.double().sum(0))


def test_a_nan_goes_through_the_product() -> None:
    weight, x, grad = torch.eye(4), draw(0, 3, 4), draw(1, 3, 4)
    x[1, 2] = grad[0, 3] = math.nan
    weight.requires_grad_()
    out = kernels.sparse_linear(x, weight)
    out.backward(grad)
    assert out.isnan().nonzero().tolist() == [[1, 2]]
    assert weight.grad is not None and weight.grad[3].isnan().all()


def test_a_second_derivative_is_refused() -> None:
    x = draw(0, 3, 8).requires_grad_()
    for out in (kernels.abs_topk(x, 2), kernels.sparse_linear(x, torch.eye(8))):
        with pytest.raises(AssertionError, match="differentiable once"):
            torch.autograd.grad(out.sum(), x, create_graph=True)


def test_worth_it() -> None:
    assert kernels.worth_it(256, 256, 0.1) and not kernels.worth_it(256, 256, 0.4)
    assert not kernels.worth_it(4, 1024, 0.01)


# --- projection ------------------------------------------------------------------------------------------------------


def by_sorting(x: Tensor, count: int) -> Tensor:
    """The first `count` of a stable sort by magnitude stay."""
    flat = x.reshape(-1)
    chosen = flat.abs().sort(descending=True, stable=True).indices[:count]
    return torch.zeros_like(flat).index_copy(0, chosen, flat[chosen]).view_as(x)


@settings(max_examples=60, deadline=None)
@given(
    SEEDS,
    st.integers(1, 40_000),
    st.one_of(st.floats(0.0, 1.0), st.floats(0.0, 0.02)),
    st.sampled_from(["normal", "rounded", "few", "equal", "tiny", "steps"]),
)
def test_projection_is_a_sort(seed: int, n: int, fraction: float, kind: str) -> None:
    x = draw(seed, n)
    x = {
        "normal": x,
        "rounded": (4 * x).round(),
        "few": sparse(seed, n, density=0.03),
        "equal": x.sign(),
        "tiny": x * 1e-42,
        "steps": x * torch.linspace(0, 1, n).round(),  # the sample's rank says little
    }[kind]
    expected = by_sorting(x, round(fraction * n))
    kernels.project_(x, fraction)
    assert torch.equal(x, expected)


def test_projection_threads_and_crowds(threads: int) -> None:
    for x in (draw(0, 300, 700), draw(1, 300, 700).mul(3).round(), sparse(2, 300, 700, density=0.01)):
        for count in (0, 1, 2100, 2101, 100_000, 209_999, 210_000):
            projected = x.clone()
            kernels.shrink_(projected, *kernels.magnitude_cut(x, count))
            assert torch.equal(projected, by_sorting(x, count))


def test_projection_whatever_the_sample_says() -> None:
    # Every entry that a sample of stride 61 sees is large, or small; the others are the opposite.
    for seen in (100.0, 0.01):
        x = draw(0, 61 * 500)
        x[::61] *= seen
        for fraction in (0.001, 0.01, 0.02, 0.5, 0.99):
            projected = x.clone()
            kernels.project_(projected, fraction)
            assert torch.equal(projected, by_sorting(x, round(fraction * x.numel())))


def test_cut_by_hand() -> None:
    x = torch.tensor([[3.0, -1.0], [1.0, 0.0], [-2.0, 1.0]])
    assert kernels.magnitude_cut(x, 0) == (math.inf, 0, 0)
    assert kernels.magnitude_cut(x, 2) == (2.0, 1, 1)
    assert kernels.magnitude_cut(x, 4) == (1.0, 2, 3)
    assert kernels.magnitude_cut(x, 5) == (1.0, 3, 3)
    assert kernels.magnitude_cut(torch.tensor([0.0, 2.0, 0.0]), 2) == (0.0, 0, 0)
    kernels.shrink_(x, 1.0, 2, 3)
    assert x.tolist() == [[3.0, -1.0], [1.0, 0.0], [-2.0, 0.0]]


def test_projection_counts_as_a_change() -> None:
    weight = torch.nn.Parameter(torch.tensor([[4.0, 1.0], [2.0, 3.0]]))
    x = torch.ones(1, 2)
    assert kernels.sparse_linear(x, weight).tolist() == [[5.0, 5.0]]
    kernels.project_(weight, 0.5)
    assert kernels.sparse_linear(x, weight).tolist() == [[4.0, 3.0]]


def test_projection_refuses_impossible_fractions() -> None:
    with pytest.raises(ValueError, match="fraction: got 1.5"):
        kernels.project_(torch.ones(3), 1.5)


# --- attention -------------------------------------------------------------------------------------------------------


def same_attention(q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, grad: Tensor) -> None:
    given = [None if x is None else x.detach().requires_grad_() for x in (q, k, v, sink)]
    exact = [None if x is None else x.detach().double().requires_grad_() for x in (q, k, v, sink)]
    out = kernels.causal_attention(*given)  # pyright: ignore[reportArgumentType]
    assert exact[0] is not None and exact[1] is not None and exact[2] is not None
    pattern = attention_pattern(exact[0], exact[1], exact[3], visible(q.shape[2], q.shape[2], None, q.device))
    expected = pattern @ exact[2]
    out.backward(grad)
    expected.backward(grad.double())
    close(out, expected)
    for found, wanted in zip(given, exact, strict=True):
        if found is not None:
            assert wanted is not None and wanted.grad is not None
            close(found.grad, wanted.grad)


@settings(max_examples=40, deadline=None)
@given(
    SEEDS,
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 80),
    st.sampled_from([1, 4, 8, 16, 24, 32]),
    st.floats(0.1, 20.0),
    st.booleans(),
)
def test_attention_is_the_plain_one(
    seed: int, batch: int, heads: int, length: int, channels: int, size: float, with_sink: bool
) -> None:
    q, k, v, grad = (draw(seed + i, batch, heads, length, channels) for i in range(4))
    same_attention(size * q, k, v, size * draw(seed, heads) if with_sink else None, grad)


def test_attention_threads_and_views(threads: int) -> None:
    # Heads split from token-major channels, one of three stretches of a wider tensor, a gradient with other strides.
    both = draw(0, 3, 70, 3 * 5 * 16)
    q, k, v = (x.unflatten(-1, (5, 16)).transpose(1, 2) for x in both.chunk(3, -1))
    same_attention(q, k, v, draw(1, 5), draw(2, 70, 5, 3, 16).transpose(0, 2))
    same_attention(q, k, v, draw(1, 5), draw(2, 1, 1, 1, 1).expand(q.shape))


def test_attention_survives_large_scores_and_shows_nan() -> None:
    q, k, v = (draw(i, 1, 1, 50, 16) for i in range(3))
    out = kernels.causal_attention(1e4 * q, 1e4 * k, v, None)
    # All the weight is on one key.
    best = (q @ k.transpose(-1, -2)).masked_fill(~torch.ones(50, 50).tril().bool(), -math.inf).argmax(-1)
    assert torch.allclose(out, v[0, 0, best[0, 0]][None, None])
    k[0, 0, 20, 3] = math.nan
    out = kernels.causal_attention(q, k, v, None)
    assert out[0, 0, :20].isfinite().all() and out[0, 0, 20:].isnan().all()


# --- the build -------------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_build(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """`library()` forgets what it found, before and after."""
    build.library.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    build.library.cache_clear()


def test_without_a_compiler_one_line_says_so(fresh_build, tmp_path, caplog) -> None:
    fresh_build.setenv(build.CACHE_VARIABLE, str(tmp_path))
    fresh_build.setenv("CXX", "no-such-compiler")
    assert not kernels.available() and not kernels.available()
    assert len(caplog.records) == 1 and "no C++ compiler found" in caplog.text


def test_a_compiler_that_fails_leaves_nothing(fresh_build, tmp_path, caplog) -> None:
    fresh_build.setenv(build.CACHE_VARIABLE, str(tmp_path))
    fresh_build.setenv("CXX", "false")
    assert not kernels.available()
    assert "false failed" in caplog.text and not list(tmp_path.iterdir())


def test_an_unusable_cache_folder_is_named(fresh_build, tmp_path, caplog) -> None:
    (tmp_path / "file").write_text("")
    fresh_build.setenv(build.CACHE_VARIABLE, str(tmp_path / "file"))
    assert not kernels.available()
    assert build.CACHE_VARIABLE in caplog.text


def test_a_cached_library_needs_no_compiler(fresh_build, tmp_path) -> None:
    fresh_build.setenv(build.CACHE_VARIABLE, str(tmp_path))
    one = [path for path in build._sources() if path.name == "topk.cpp"]
    assert one
    fresh_build.setattr(build, "_sources", lambda: one)  # a second is enough of compiling
    assert kernels.available()
    assert [path.suffix for path in tmp_path.iterdir()] == [".so"]
    build.library.cache_clear()
    fresh_build.setenv("CXX", "no-such-compiler")
    assert kernels.available()

"""Every compiled operation against the plain one."""

import math
from collections.abc import Iterator

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from distill.model import kernels
from distill.model import topk as plain_topk
from distill.model.kernels import build

SEEDS = st.integers(0, 2**32 - 1)


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


# --- AbsTopK ---------------------------------------------------------------------------------------------------------


def same_topk(x: Tensor, k: int) -> None:
    fast, plain = (x.clone().requires_grad_() for _ in range(2))
    grad = draw(1, *x.shape)
    a, b = kernels.abs_topk(fast, k), plain_topk.abs_topk(plain, k)
    assert torch.equal(a, b)
    a.backward(grad)
    b.backward(grad)
    assert fast.grad is not None and plain.grad is not None
    assert torch.equal(fast.grad, plain.grad)


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
        "huge": torch.exp(30 * x),
    }[kind]
    same_topk(x, max(1, round(share * width)))


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
    assert kernels.available()
    assert [path.suffix for path in tmp_path.iterdir()] == [".so"]
    build.library.cache_clear()
    fresh_build.setenv("CXX", "no-such-compiler")
    assert kernels.available()

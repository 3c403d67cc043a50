"""The Triton operations against the plain ones: on a CUDA device where there is one, else by triton's interpreter.

The interpreter has to be switched on before triton is imported, which torch may do, so it runs in a process of its own
(`-m slow`).
"""

import importlib.util
import math
import os
import subprocess
import sys

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from distill.model.kernels import cuda
from distill.model.topk import top_mask
from distill.training.sparsity import magnitude_threshold
from distill.training.sparsity import project_ as plain_project_
from distill.training.threshold import project_counted_

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INSTALLED = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
runs = pytest.mark.skipif(
    not (INSTALLED and (DEVICE == "cuda" or INTERPRETED)), reason="neither a CUDA device nor triton's interpreter"
)
# The interpreter counts with numpy, which speaks of squares that overflow and of NaN.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
SEEDS = st.integers(0, 2**32 - 1)
KINDS = ["normal", "rounded", "few", "equal", "tiny", "huge"]
TYPES = [torch.float32, torch.bfloat16, torch.float16]


def draw(seed: int, *shape: int, kind: str = "normal", dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    x = {
        "normal": x,
        "rounded": (2 * x).round() / 2,
        "few": x * (torch.rand(shape, generator=generator) > 0.9),
        "equal": x.sign(),
        "tiny": x * 1e-42,
        "huge": torch.exp(15 * x),
    }[kind]
    return x.to(DEVICE, dtype)


def same_topk(x: Tensor, k: int) -> None:
    leaf = x.clone().requires_grad_()
    grad, mask = draw(1, *x.shape).to(x.dtype), top_mask(x.float(), k)
    out = cuda.abs_topk(leaf, k)
    assert torch.equal(out, torch.where(mask, x, 0.0))
    out.backward(grad)
    assert leaf.grad is not None and torch.equal(leaf.grad, torch.where(mask, grad, 0.0))


@runs
@settings(max_examples=25, deadline=None)
@given(SEEDS, st.integers(1, 3), st.integers(2, 200), st.floats(0, 1), st.sampled_from(KINDS), st.sampled_from(TYPES))
def test_topk_is_the_plain_one(seed: int, rows: int, width: int, share: float, kind: str, dtype: torch.dtype) -> None:
    x = draw(seed, rows, width, kind=kind, dtype=dtype)
    same_topk(x, min(max(1, round(share * width)), width - 1))


@runs
def test_topk_of_views_and_of_rows_longer_than_a_block() -> None:
    x = draw(0, 2, 5, 67)
    same_topk(x[:, ::2, 1:], 9)
    same_topk(x.transpose(0, 2), 3)
    same_topk(draw(1, 1, 67).expand(4, 67), 5)
    same_topk(draw(2, 2, 3000), 750)


@runs
def test_topk_by_hand() -> None:
    x = torch.tensor([[1.0, -2.0, 2.0, -2.0], [0.0, -0.0, 0.0, 3.0]], device=DEVICE)
    assert cuda.abs_topk(x, 2).tolist() == [[0.0, -2.0, 2.0, 0.0], [0.0, 0.0, 0.0, 3.0]]
    odd = torch.tensor([[math.nan, 5.0, math.inf, -7.0]], device=DEVICE)
    kept = cuda.abs_topk(odd, 2).tolist()[0]
    assert math.isnan(kept[0]) and kept[1:] == [0.0, math.inf, 0.0]


@runs
def test_topk_edges() -> None:
    x = draw(0, 3, 4)
    assert cuda.abs_topk(x, 4) is x
    empty = torch.empty(0, 4, device=DEVICE)
    assert cuda.abs_topk(empty, 2) is empty
    with pytest.raises(ValueError, match="k: 0"):
        cuda.abs_topk(x, 0)


@runs
@settings(max_examples=12, deadline=None)
@given(
    SEEDS,
    st.integers(1, 300),
    st.floats(0, 1),
    st.sampled_from(KINDS),
    st.sampled_from(TYPES),
    st.one_of(st.none(), st.floats(1e-6, 1e6)),
)
def test_projection_is_the_plain_one(
    seed: int, n: int, fraction: float, kind: str, dtype: torch.dtype, start: float | None
) -> None:
    x = draw(seed, n, kind=kind, dtype=dtype)
    wanted = x.float().cpu()
    plain_project_(wanted, fraction)
    version = x._version
    cuda.project_(x, fraction, start)
    assert torch.equal(x.float().cpu(), wanted)
    assert x._version > version or torch.equal(wanted, draw(seed, n, kind=kind, dtype=dtype).float().cpu())


@runs
def test_cut_means_what_it_says() -> None:
    x = torch.tensor([3.0, -1.0, 1.0, 0.0, 1.0, -0.5], device=DEVICE)
    assert cuda.magnitude_cut(x, 0) == (math.inf, 0, 0)
    assert cuda.magnitude_cut(x, 6)[0] == 0.0
    assert cuda.magnitude_cut(x, 2) == (1.0, 1, 3) == cuda.magnitude_cut(x, 2, start=0.9)
    value, stay, equal = cuda.magnitude_cut(x, 4)
    assert 0.5 < value < 1.0 and stay == equal == 0
    zeros = torch.zeros(9, device=DEVICE)
    zeros[4] = 2.0
    assert cuda.magnitude_cut(zeros, 3)[0] == 0.0


@runs
def test_ties_in_several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_BLOCK", 16)
    x = draw(0, 100, kind="rounded")
    wanted = x.cpu().clone()
    plain_project_(wanted, 0.37)
    cuda.project_(x, 0.37)
    assert torch.equal(x.cpu(), wanted)


@runs
@pytest.mark.parametrize(("floor", "axis"), [(0, None), (3, 0), (2, 1)])
def test_projection_on_any_device_takes_it(floor: int, axis: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    cut = cuda.magnitude_cut
    monkeypatch.setattr(cuda, "magnitude_cut", lambda *a: asked.append(a[1]) or cut(*a))
    x = draw(0, 30, 20)
    wanted = x.cpu().clone()
    kept = plain_project_(wanted, 0.05, floor=floor, axis=axis)
    assert project_counted_(x, 0.05, floor=floor, axis=axis) == kept
    assert torch.equal(x.cpu(), wanted) and asked == [30]


@runs
def test_fraction_is_checked() -> None:
    with pytest.raises(ValueError, match="fraction"):
        cuda.project_(draw(0, 4), 1.1)


@runs
def test_what_is_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cuda.usable(draw(0, 4)) and not cuda.usable(draw(0, 4).double())
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert not cuda.usable(torch.zeros(3)) and not cuda.usable(torch.zeros(3, device="meta"))


@pytest.mark.gpu
def test_on_a_device_at_full_size() -> None:
    x = torch.randn(1 << 14, 1 << 13, device="cuda", dtype=torch.bfloat16)
    same_topk(x[:512], 2048)
    weight = torch.randn(1 << 26, device="cuda")
    count = round(0.01 * weight.numel())
    value, stay, equal = cuda.magnitude_cut(weight, count)
    wanted = magnitude_threshold(weight.abs(), count)
    assert int((weight.abs() > value).sum()) + stay == count and value <= wanted.value
    cuda.shrink_(weight, value, stay, equal)
    assert int(weight.count_nonzero()) == count


COMPILE = """
import warnings
warnings.simplefilter("ignore")
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from distill.model.kernels import cuda_programs

def build(name, sizes, **signature):
    signature |= {size: "constexpr" for size in sizes}
    source = ASTSource(fn=getattr(cuda_programs, name), signature=signature, constexprs=sizes)
    assert triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"], name

for kind in ("*fp32", "*bf16", "*fp16"):
    rows = {"width": "i32", "bits": "*u8", "out": kind}
    build("topk_forward", {"BLOCK": 1024}, x=kind, k="i32", expected="fp32", **rows)
    build("topk_backward", {"BLOCK": 1024}, grad=kind, **rows)
    build("count_reaching", {"BLOCK": 4096}, x=kind, n="i64", state="*i64", bounds="*i32", counts="*i64")
    build("count_ties", {"BLOCK": 4096}, x=kind, n="i64", key="i32", ties="*i64")
    for ties in (False, True):
        build("shrink", {"TIES": ties, "BLOCK": 4096}, x=kind, n="i64", key="i32", before="*i64", stay="i32")
build("narrow", {}, state="*i64", bounds="*i32", counts="*i64", count="i32")
"""


@pytest.mark.slow
@pytest.mark.skipif(not INSTALLED, reason="triton is not installed")
def test_programs_compile_for_a_device_that_is_not_here() -> None:
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.skipif(not INSTALLED, reason="triton is not installed")
@pytest.mark.skipif(INTERPRETED or DEVICE == "cuda", reason="the tests above run here")
def test_by_the_interpreter() -> None:
    # Nothing of this run's own options goes along: neither its marks nor its plugins' state.
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-3000:]

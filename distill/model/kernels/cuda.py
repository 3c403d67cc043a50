"""AbsTopK and the projection on a CUDA device, in Triton: counting instead of sorting.

`usable` says whether a tensor can be given to these; nothing here imports triton before one is. Where triton's
interpreter is switched on, tensors on the CPU are taken as well, slowly.
"""

import functools
import importlib.util
import math
import os
from contextlib import nullcontext
from statistics import NormalDist
from types import ModuleType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

LONGEST_ROW = 1 << 15
"""Columns up to which a row's magnitudes are held in the registers of one program."""
_TYPES = (torch.float32, torch.bfloat16, torch.float16)
_BLOCK = 4096
_COUNTING_PROGRAMS = 2048  # several for each multiprocessor
_PROBES = 16
_PASSES = 9  # 17^8 exceeds the number of magnitudes; one more for the guess
_SPREAD = 1 / 64  # how far around a guess the first bounds reach, as a share of it


@functools.cache
def _programs() -> ModuleType:
    return importlib.import_module("distill.model.kernels.cuda_programs")


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def usable(x: Tensor) -> bool:
    """Whether these operations take a tensor like this one: of 2 or 4 bytes, on a CUDA device, and triton installed."""
    here = x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
    return here and x.dtype in _TYPES and _installed()


def _on(x: Tensor) -> Any:
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


# --- AbsTopK ---------------------------------------------------------------------------------------------------------


class _AbsTopK(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, k: int) -> Tensor:
        x = x.contiguous()
        width = x.shape[-1]
        rows = x.numel() // width
        out = torch.empty_like(x)
        bits = torch.empty(rows, -(-width // 8), dtype=torch.uint8, device=x.device)
        block = max(16, 1 << (width - 1).bit_length())
        warps = min(16, max(1, block // 512))
        expected = NormalDist().inv_cdf(1 - k / width / 2)
        with _on(x):
            _programs().topk_forward[(rows,)](x, out, bits, width, k, expected, BLOCK=block, num_warps=warps)
        ctx.save_for_backward(bits)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        assert not torch.is_grad_enabled(), "differentiable once: no create_graph"
        (bits,) = ctx.saved_tensors
        grad = grads[0].contiguous()
        width = grad.shape[-1]
        out = torch.empty_like(grad)
        block = min(2048, 1 << (width - 1).bit_length())
        with _on(grad):
            grid = (grad.numel() // width, -(-width // block))
            _programs().topk_backward[grid](grad, bits, out, width, BLOCK=block)
        return out, None


def abs_topk(x: Float[Tensor, "*rows width"], k: int) -> Float[Tensor, "*rows width"]:
    """As `distill.model.topk.abs_topk` [G 2.1], for a `usable` tensor of at most `LONGEST_ROW` columns.

    One program per row searches the cut among the row's magnitudes, which it holds in registers: one read and one write
    of the tensor. For backward a bit per entry is kept. NaN counts as larger than everything. Differentiable once.
    """
    if k < 1:
        raise ValueError(f"k: {k} channels kept; allowed are 1 and more")
    width = x.shape[-1]
    assert usable(x) and width <= LONGEST_ROW, f"{x.dtype} on {x.device}, {width} columns"
    if k >= width or x.numel() == 0:
        return x
    out = _AbsTopK.apply(x, k)
    assert isinstance(out, Tensor)
    return out


# --- projection ------------------------------------------------------------------------------------------------------


def magnitude_cut(x: Tensor, count: int, start: float | None = None) -> tuple[float, int, int]:
    """Where to cut a contiguous `usable` tensor so that the `count` entries of largest magnitude stay.

    A pass over the data counts how many entries reach each of 16 bounds, and the next pass looks between two of them;
    the device goes on without waiting for the host, and passes after the cut is found do nothing.

    Arguments:
        x: the entries, of any sign and shape; NaN counts as the largest.
        count: how many stay, 0 to numel.
        start: a magnitude near the cut, such as that of the last step: saves about half of the passes.

    Returns (value, stay, equal): entries above `value` in magnitude stay, and the first `stay` of the `equal` many
    that are equal to it. Value 0: all non-zero entries stay. Infinity with stay 0: none.
    """
    n = x.numel()
    assert 0 <= count <= n and usable(x) and x.is_contiguous(), f"{count} of {n}, {x.dtype} on {x.device}"
    if count == 0:
        return math.inf, 0, 0
    if count == n:
        return 0.0, 0, 0
    programs = _programs()
    # Nothing is less than 0 and no magnitude reaches LARGEST + 1, whatever the data.
    bracket = [0, programs.LARGEST.value + 1, n, 0]
    state = torch.tensor(bracket, dtype=torch.int64, device=x.device)
    bounds = torch.tensor(_first_bounds(start, bracket[1]), dtype=torch.int32, device=x.device)
    counts = torch.zeros(_PROBES, dtype=torch.int64, device=x.device)
    grid = (min(_COUNTING_PROGRAMS, -(-n // _BLOCK)),)
    with _on(x):
        for _ in range(_PASSES):
            programs.count_reaching[grid](x, n, state, bounds, counts, BLOCK=_BLOCK, num_warps=8)
            programs.narrow[(1,)](state, bounds, counts, count, num_warps=1)
    low, high, from_low, from_high = state.tolist()
    assert high - low == 1, f"not found between {low} and {high}"
    if low == 0 and from_high < count:
        return 0.0, 0, 0
    return _value(low), count - from_high, from_low - from_high if from_high < count else 0


def _first_bounds(start: float | None, end: int) -> list[int]:
    """Bounds of the first pass: close around the guess and wider and wider away from it, or spread evenly."""
    if start is None or not 0 < start < math.inf:
        return [end * (i + 1) // (_PROBES + 1) for i in range(_PROBES)]
    shares = [_SPREAD * 4.0**i for i in range(-4, 4)]  # 1/16384 to 1
    around = [start * (1 - min(s, 0.99)) for s in shares] + [start * (1 + s) for s in shares]
    return sorted(min(max(_key(value), 1), end - 1) for value in around)


def _key(value: float) -> int:
    return int(torch.tensor(value, dtype=torch.float32).view(torch.int32))


def _value(key: int) -> float:
    return float(torch.tensor(key, dtype=torch.int32).view(torch.float32))


def shrink_(x: Tensor, value: float, stay: int, equal: int) -> None:
    """Sets to zero, in place, what `magnitude_cut` says is to go: for a contiguous `usable` tensor."""
    data = x.detach()
    assert usable(data) and data.is_contiguous(), f"{data.dtype} on {data.device}"
    if value == 0 and stay == 0:
        return
    if math.isinf(value) and stay == 0:
        data.zero_()
        return
    n, key, programs = data.numel(), _key(value), _programs()
    grid = (-(-n // _BLOCK),)
    with _on(data):
        if equal > stay > 0:
            ties = torch.empty(grid[0], dtype=torch.int64, device=data.device)
            programs.count_ties[grid](data, n, key, ties, BLOCK=_BLOCK, num_warps=8)
            before = ties.cumsum(0) - ties
            programs.shrink[grid](data, n, key, before, stay, TIES=True, BLOCK=_BLOCK, num_warps=8)
        else:
            least = key if stay else key + 1
            programs.shrink[grid](data, n, least, data, 0, TIES=False, BLOCK=_BLOCK, num_warps=8)
    torch.autograd.graph.increment_version(data)


def project_(x: Tensor, fraction: float, start: float | None = None) -> float:
    """Keeps the round(fraction * numel) entries of largest magnitude, sets the others to zero, in place [G A.2].

    Ties go to the lowest flat index. For a contiguous `usable` tensor. Returns the cut, which helps the next search.

    Arguments:
        x: a tensor or parameter of any shape.
        fraction: share of the entries that stay. ValueError outside [0, 1].
        start: as of `magnitude_cut`.
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction: got {fraction}, allowed is 0 to 1")
    cut = magnitude_cut(x.detach(), round(fraction * x.numel()), start)
    shrink_(x, *cut)
    return cut[0]

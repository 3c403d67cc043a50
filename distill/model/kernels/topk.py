"""AbsTopK by counting, compiled: same results as `distill.model.topk`, forward and backward."""

import math
from functools import lru_cache
from statistics import NormalDist
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from distill.model.kernels.build import call, threads

_WORD = 64


@lru_cache(maxsize=256)
def _expected_cut(k: int, width: int) -> tuple[float, float]:
    """Where the k-th largest of `width` normal magnitudes lies, and how many lie there per unit: a first guess."""
    share = min(max(k / width, 1e-6), 1 - 1e-6)
    at = NormalDist().inv_cdf(1 - share / 2)
    return at, width * 2 * math.exp(-at * at / 2) / math.sqrt(2 * math.pi)


class _AbsTopK(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, k: int) -> Tensor:
        x = x.contiguous()
        width = x.shape[-1]
        rows = x.numel() // width
        out = torch.empty_like(x)
        kept = torch.empty(rows, -(-width // _WORD), dtype=torch.int64)
        at, density = _expected_cut(k, width)
        call("topk_forward", x, rows, width, k, at, density, kept, out, threads(x.numel()))
        ctx.save_for_backward(kept)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        assert not torch.is_grad_enabled(), "differentiable once: no create_graph"
        (kept,) = ctx.saved_tensors
        grad = grads[0].contiguous()
        width = grad.shape[-1]
        out = torch.empty_like(grad)
        call("topk_backward", grad, kept, grad.numel() // width, width, out, threads(grad.numel()))
        return out, None


def abs_topk(x: Float[Tensor, "*rows width"], k: int) -> Float[Tensor, "*rows width"]:
    """As `distill.model.topk.abs_topk` [G 2.1], for float32 on a CPU where `available()`.

    A NaN counts as larger than everything, so it is kept and goes on; dropped entries are +0 whatever their sign, and
    0 also where they were infinite. Differentiable once.
    """
    assert x.dtype == torch.float32 and x.device.type == "cpu", f"{x.dtype} on {x.device}"
    if k < 1:
        raise ValueError(f"k: {k} channels kept; allowed are 1 and more")
    if k >= x.shape[-1] or x.numel() == 0:
        return x
    out = _AbsTopK.apply(x, k)
    assert isinstance(out, Tensor)
    return out

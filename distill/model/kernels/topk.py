"""AbsTopK by counting, compiled, also behind a non-linearity: same results as the plain operations."""

import math
from functools import lru_cache
from statistics import NormalDist
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from distill.model.kernels.build import call, threads

ACTIVATIONS = {"identity": 0, "gelu": 1, "gelu_new": 2, "relu": 3}
"""Non-linearities that the kernels know, with their numbers in functions.hpp."""

_WORD = 64
_SPARE = 16
"""Places between two rows of slopes, see row.hpp."""


@lru_cache(maxsize=256)
def expected_cut(k: int, width: int) -> tuple[float, float]:
    """Where the k-th largest of `width` normal magnitudes lies, and how many lie there per unit: a first guess."""
    share = min(max(k / width, 1e-6), 1 - 1e-6)
    at = NormalDist().inv_cdf(1 - share / 2)
    return at, width * 2 * math.exp(-at * at / 2) / math.sqrt(2 * math.pi)


def record_of(rows: int, width: int, k: int, activation: str) -> tuple[Tensor | None, Tensor | None]:
    """Room for what the way back needs: the bits of what AbsTopK keeps (rows, words), None from k = width on, and the
    activation's derivatives there, None for the identity."""
    mask = torch.empty(rows, -(-width // _WORD), dtype=torch.int64) if k < width else None
    slope = None if activation == "identity" else torch.empty(rows, min(k, width) + _SPARE)
    return mask, slope


def finish(x: Tensor, k: int, activation: str, mask: Tensor | None, slope: Tensor | None, out: Tensor) -> None:
    """out = AbsTopK of the activation of x (contiguous), which may be `out`; fills `mask` and `slope`."""
    width = x.shape[-1]
    shape = (x.numel() // width, width, min(k, width), ACTIVATIONS[activation], *expected_cut(k, width))
    call("topk_forward", x, *shape, mask, slope, out, threads(x.numel()))


def pass_back(grad: Float[Tensor, "*rows width"], k: int, mask: Tensor | None, slope: Tensor | None) -> Tensor:
    """The gradient before activation and AbsTopK; `grad` itself where there is nothing to do."""
    if mask is None and slope is None:
        return grad
    width = grad.shape[-1]
    out = torch.empty_like(grad)
    call("topk_backward", grad, mask, slope, min(k, width), grad.numel() // width, width, out, threads(grad.numel()))
    return out


class _AbsTopK(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, k: int) -> Tensor:
        width = x.shape[-1]
        mask, _ = record_of(x.numel() // width, width, k, "identity")
        ctx.save_for_backward(mask)
        return _selected(x, k, mask)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        assert not torch.is_grad_enabled(), "differentiable once: no create_graph"
        (mask,) = ctx.saved_tensors
        return pass_back(grads[0].contiguous(), 0, mask, None), None


def _selected(x: Tensor, k: int, mask: Tensor | None) -> Tensor:
    x = x.contiguous()
    out = torch.empty_like(x)
    finish(x, k, "identity", mask, None, out)
    return out


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
    if not (torch.is_grad_enabled() and x.requires_grad):
        return _selected(x.detach(), k, None)
    out = _AbsTopK.apply(x, k)
    assert isinstance(out, Tensor)
    return out

"""AbsTopK, the activation sparsity of weight-sparse transformers [G 2.1, A.1]."""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from distill.model import kernels
from distill.model.kernels import cuda
from distill.model.path import native, triton


def top_mask(x: Float[Tensor, "*rows width"], k: int) -> Bool[Tensor, "*rows width"]:
    """Which entries of each row are among its `k` largest in magnitude.

    Ties are broken by the lower index. Zeros are never kept: a row with fewer than `k` non-zeros keeps just those
    (a zero that were kept would let a gradient through that depends on the order of a sort).
    """
    size = x.abs()
    if k >= x.shape[-1]:
        return size > 0
    largest = size.topk(k, dim=-1, sorted=False).values
    # Not a number counts as the largest, but the others are compared with the smallest number kept.
    threshold = largest.nan_to_num(nan=torch.inf, posinf=torch.inf).amin(-1, keepdim=True)
    mask = (size >= threshold) & (size > 0)
    if int(mask.sum(-1).max()) > k:
        above = size > threshold
        tied = mask & ~above
        room = k - above.sum(-1, keepdim=True)
        mask = above | (tied & (tied.cumsum(-1) <= room))
    return mask


class _AbsTopK(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, k: int) -> Tensor:
        mask = top_mask(x, k)
        ctx.save_for_backward(mask)
        return x * mask

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor, None]:
        (mask,) = ctx.saved_tensors
        return grad[0] * mask, None


def abs_topk(x: Float[Tensor, "*rows width"], k: int) -> Float[Tensor, "*rows width"]:
    """Keeps the `k` entries of each row that are largest in magnitude, sign and all, and zeroes the rest [G 2.1].

    The gradient passes through the kept entries. `k` is a count of channels, at least 1; from the width of the row on,
    nothing is dropped. ValueError for another `k`.
    """
    if k < 1:
        raise ValueError(f"k: {k} channels kept; allowed are 1 and more")
    if k >= x.shape[-1]:
        return x
    if native(x):
        return kernels.abs_topk(x, k)
    if triton(x) and x.shape[-1] <= cuda.LONGEST_ROW:
        return cuda.abs_topk(x, k)
    out = _AbsTopK.apply(x, k)
    assert isinstance(out, Tensor)
    return out

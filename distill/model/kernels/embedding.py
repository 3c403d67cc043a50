"""Rows of a table by number, compiled: added to activations, and summed up on the way back."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from distill.model.kernels.build import call, threads


def _summed(grad: Tensor, ids: Tensor, rows: int) -> Tensor:
    """The gradient of a table: of each row the sum where it was used."""
    out = grad.new_empty(rows, grad.shape[-1])
    call("embedding_sum", grad.contiguous(), ids, ids.numel(), *out.shape, out, threads(grad.numel() + out.numel()))
    return out


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table: Tensor, ids: Tensor) -> Tensor:
        ctx.rows = len(table)
        ctx.save_for_backward(ids.contiguous())
        return F.embedding(ids, table)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        assert not torch.is_grad_enabled(), "differentiable once: no create_graph"
        return _summed(grads[0], ctx.saved_tensors[0], ctx.rows), None


class _AddRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, table: Tensor, ids: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        ctx.rows = len(table)
        ids = ids.contiguous()
        ctx.save_for_backward(ids)
        call("embedding_add", table.contiguous(), ids, ids.numel(), x.shape[-1], x, threads(x.numel()))
        return x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        assert not torch.is_grad_enabled(), "differentiable once: no create_graph"
        (ids,) = ctx.saved_tensors
        return grads[0], _summed(grads[0], ids, ctx.rows) if ctx.needs_input_grad[1] else None, None


def embedding(table: Float[Tensor, "V D"], ids: Int[Tensor, "*rows"]) -> Float[Tensor, "*rows D"]:
    """The rows of `table` that `ids` (int64) name, for float32 on a CPU where `available()`. Differentiable once."""
    if not (torch.is_grad_enabled() and table.requires_grad) or ids.numel() == 0:
        return F.embedding(ids, table)
    out = _Embedding.apply(table, ids)
    assert isinstance(out, Tensor)
    return out


def add_rows_(
    x: Float[Tensor, "*rows V"], table: Float[Tensor, "n V"], ids: Int[Tensor, "*rows"]
) -> Float[Tensor, "*rows V"]:
    """x plus the rows of `table` that `ids` (int64) name, in place: x is contiguous and nobody else's.

    As `embedding` otherwise.
    """
    if x.numel() == 0:
        return x
    out = _AddRows.apply(x, table, ids)
    assert isinstance(out, Tensor)
    return out

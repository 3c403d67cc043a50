"""Cross-entropy, compiled: one pass over the logits makes the loss and, where it is asked for, the gradient."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from distill.model.kernels.build import call, threads


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        grad = torch.empty_like(logits)
        ctx.save_for_backward(grad)
        return _mean(logits, targets, grad)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        assert not torch.is_grad_enabled(), "differentiable once: no create_graph"
        (grad,) = ctx.saved_tensors
        return grad if float(grads[0]) == 1.0 else grad * grads[0], None


def _mean(logits: Tensor, targets: Tensor, grad: Tensor | None) -> Tensor:
    rows, width = logits.shape
    counted = int((targets >= 0).sum())
    losses = logits.new_empty(rows)
    share = 1 / counted if counted else 0.0
    call("loss_forward", logits, targets, rows, width, share, losses, grad, threads(logits.numel()))
    return losses.double().sum().div(counted).to(logits.dtype)


def cross_entropy(logits: Float[Tensor, "n V"], targets: Int[Tensor, " n"]) -> Float[Tensor, ""]:
    """Mean of -log softmax(logits)[target] in nats over the targets that are not negative; NaN where there are none.

    For float32 on a CPU where `available()`. Differentiable once.
    """
    assert logits.dtype == torch.float32 and targets.dtype == torch.int64, f"{logits.dtype}, {targets.dtype}"
    if torch.is_grad_enabled() and logits.requires_grad:
        out = _CrossEntropy.apply(logits.contiguous(), targets.contiguous())
        assert isinstance(out, Tensor)
        return out
    return _mean(logits.contiguous(), targets.contiguous(), None)

"""RMSNorm and LayerNorm with the AbsTopK behind them, compiled."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from distill.model.kernels.build import call, threads
from distill.model.kernels.topk import expected_cut, record_of

_CHUNK = 64


class _NormTopK(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, bias: Tensor | None, center: bool, eps: float, k: int) -> Tensor:
        width = x.shape[-1]
        mask, _ = record_of(x.numel() // width, width, k, "identity")
        x, gain = x.contiguous(), gain.contiguous()
        out, shift, scale = _normed(x, gain, bias, center, eps, k, mask)
        ctx.center = center
        ctx.save_for_backward(x, gain, shift, scale, mask)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None, None, None]:
        assert not torch.is_grad_enabled(), "differentiable once: no create_graph"
        x, gain, shift, scale, mask = ctx.saved_tensors
        rows, width = scale.numel(), x.shape[-1]
        to_gain, to_bias = (
            x.new_empty(-(-rows // _CHUNK), width) if wanted else None for wanted in ctx.needs_input_grad[1:3]
        )
        out = torch.empty_like(x)
        shape = (rows, width, int(ctx.center))
        n = threads(x.numel())
        call("norm_backward", grads[0].contiguous(), x, gain, shift, scale, mask, *shape, out, to_gain, to_bias, n)
        to_gain, to_bias = (None if parts is None else parts.sum(0) for parts in (to_gain, to_bias))
        return out, to_gain, to_bias, None, None, None


def _normed(
    x: Tensor, gain: Tensor, bias: Tensor | None, center: bool, eps: float, k: int, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    width = x.shape[-1]
    rows = x.numel() // width
    out = torch.empty_like(x)
    shift, scale = x.new_empty(2, rows)
    bias = None if bias is None else bias.contiguous()
    shape = (rows, width, int(center), float(eps), min(k, width), *expected_cut(k, width))
    call("norm_forward", x, gain, bias, *shape, shift, scale, mask, out, threads(x.numel()))
    return out, shift, scale


def norm_topk(
    x: Float[Tensor, "*rows D"],
    gain: Float[Tensor, " D"],
    bias: Float[Tensor, " D"] | None,
    *,
    center: bool,
    eps: float,
    k: int | None,
) -> Float[Tensor, "*rows D"]:
    """RMSNorm, or with `center` LayerNorm, and the `k` largest magnitudes of what comes out; all of it where k is None.

    For float32 on a CPU where `available()`; as the plain operations but for rounding. Differentiable once.
    """
    assert x.dtype == torch.float32 and x.device.type == "cpu", f"{x.dtype} on {x.device}"
    if x.numel() == 0:
        return x
    keep = x.shape[-1] if k is None else k
    if not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, gain, bias))):
        return _normed(x.detach().contiguous(), gain.detach().contiguous(), bias, center, eps, keep, None)[0]
    out = _NormTopK.apply(x, gain, bias, center, eps, keep)
    assert isinstance(out, Tensor)
    return out

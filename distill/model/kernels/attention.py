"""Causal attention with a sink, compiled: forward and backward without a (T, T) tensor."""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from distill.model.kernels.build import call, threads


def _rows(x: Tensor) -> Tensor:
    """(B, N, T, H) as (B, T, N, H): no copy where the heads were split from token-major channels."""
    return x.transpose(1, 2).contiguous()


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None) -> Tensor:
        q, k, v = (_rows(x) for x in (q, k, v))
        sink = None if sink is None else sink.contiguous()
        batch, length, heads, channels = q.shape
        out, logsum = torch.empty_like(q), q.new_empty(batch, heads, length)
        scale, n = 1 / math.sqrt(channels), threads(q.numel() * length // 16)
        call("attention_forward", q, k, v, sink, batch, length, heads, channels, scale, out, logsum, n)
        ctx.save_for_backward(q, k, v, sink, out, logsum)
        return out.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        assert not torch.is_grad_enabled(), "differentiable once: no create_graph"
        q, k, v, sink, out, logsum = ctx.saved_tensors
        grad = _rows(grads[0])
        batch, length, heads, channels = q.shape
        to_q, to_k, to_v = (torch.empty_like(q) for _ in range(3))
        to_sink = q.new_empty(batch, heads)
        scale, n = 1 / math.sqrt(channels), threads(q.numel() * length // 16)
        shape = (batch, length, heads, channels, scale)
        call("attention_backward", q, k, v, sink, out, logsum, grad, *shape, to_q, to_k, to_v, to_sink, n)
        turned = (x.transpose(1, 2) for x in (to_q, to_k, to_v))
        return *turned, None if sink is None else to_sink.sum(0)  # pyright: ignore[reportReturnType]


def causal_attention(
    q: Float[Tensor, "B N T H"],
    k: Float[Tensor, "B N T H"],
    v: Float[Tensor, "B N T H"],
    sink: Float[Tensor, " N"] | None,
) -> Float[Tensor, "B N T H"]:
    """softmax over [sink, q k / sqrt(H)] of the tokens up to each query, times v [G A.1]; float32 on a CPU.

    Whole sequences without padding, as many queries as keys. Fastest where q, k and v were split from token-major
    channels, and H is 16 or a multiple. Differentiable once.
    """
    assert q.shape == k.shape == v.shape and q.dtype == torch.float32, f"{q.shape}, {k.shape}, {v.shape}, {q.dtype}"
    if q.numel() == 0:
        return q
    out = _CausalAttention.apply(q, k, v, sink)
    assert isinstance(out, Tensor)
    return out

"""The operations under the one forward, in plain torch: what a reader reads.

Each is a pure function of tensors. A faster form of one stands beside the plain one that a test holds it to; `set_path`
chooses between them for the whole process.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from distill.model import kernels
from distill.model.linear_path import chosen

PATHS = ("auto", "plain")
_path = "auto"


def set_path(path: str) -> None:
    """Chooses the operations: auto takes the compiled ones where there are such, plain never. ValueError for others."""
    global _path
    if path not in PATHS:
        raise ValueError(f"path: {path!r} is no set of operations; allowed are {', '.join(PATHS)}")
    _path = path


def native(x: Tensor) -> bool:
    """Whether the compiled operations are to be used on a tensor like this one."""
    fits = x.dtype == torch.float32 and x.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
    return fits and _path == "auto" and kernels.available()


def norm_scale(x: Float[Tensor, "*rows D"], *, center: bool, eps: float) -> Float[Tensor, "*rows 1"]:
    """1/sigma per row: of the root mean square, or of the standard deviation where the norm centres."""
    if center:
        return torch.rsqrt(x.var(-1, keepdim=True, correction=0) + eps)
    return torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def scaled(
    x: Float[Tensor, "*rows D"],
    scale: Float[Tensor, "*rows 1"],
    gain: Float[Tensor, " D"],
    bias: Float[Tensor, " D"] | None,
    *,
    center: bool,
) -> Float[Tensor, "*rows D"]:
    """RMSNorm or LayerNorm with 1/sigma given: the centring, which is linear, is never frozen."""
    if center:
        x = x - x.mean(-1, keepdim=True)
    x = x * scale * gain
    return x if bias is None else x + bias


_densities: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def density(weight: Float[Tensor, "o i"]) -> float:
    """Share of non-zeros, counted again only when the weight has changed."""
    state = (weight.data_ptr(), weight._version)
    known = _densities.get(weight)
    if known is None or known[0] != state:
        known = _densities[weight] = (state, int(weight.count_nonzero()) / max(weight.numel(), 1))
    return known[1]


class _OneDnnLinear(torch.autograd.Function):
    """x W^T + b by oneDNN, which on many CPUs takes half of the time of the default library."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        rows = grads[0].reshape(-1, weight.shape[0])
        grad_x = _product(rows, weight.T, None).view_as(x) if ctx.needs_input_grad[0] else None
        if native(x) and ctx.needs_input_grad[1]:
            grad_weight, grad_bias = kernels.weight_gradient(grads[0], x)
            return grad_x, grad_weight, grad_bias if ctx.needs_input_grad[2] else None
        grad_weight = _product(rows.T, x.reshape(-1, x.shape[-1]).T, None) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight, rows.sum(0) if ctx.needs_input_grad[2] else None


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def linear(
    x: Float[Tensor, "*rows i"], weight: Float[Tensor, "o i"], bias: Float[Tensor, " o"] | None
) -> Float[Tensor, "*rows o"]:
    """x W^T + b: without the zeros of W where there are many, by oneDNN elsewhere, plainly where asked for."""
    if native(x) and x.numel() and chosen(weight.shape[0], weight.shape[1], density(weight)):
        return kernels.sparse_linear(x, weight, bias)
    plain = _path == "plain" or x.dtype != torch.float32 or x.device.type != "cpu" or torch.is_autocast_enabled("cpu")
    if plain or not torch.backends.mkldnn.is_available() or x.numel() == 0:
        return F.linear(x, weight, bias)
    out = _OneDnnLinear.apply(x, weight, bias)
    assert isinstance(out, Tensor)
    return out


def visible(
    n_query: int, n_key: int, attention_mask: Int[Tensor, "B K"] | Bool[Tensor, "B K"] | None, device: torch.device
) -> Bool[Tensor, "#B 1 Q K"]:
    """Which keys each query may see: those not after it, and not padding. Queries are the last of the keys."""
    offset = n_key - n_query
    causal = torch.ones(n_query, n_key, dtype=torch.bool, device=device).tril(offset)[None, None]
    if attention_mask is None:
        return causal
    return causal & attention_mask.bool()[:, None, None, :]


def attention_pattern(
    q: Float[Tensor, "B N Q H"],
    k: Float[Tensor, "B N K H"],
    sink: Float[Tensor, " N"] | None,
    allowed: Bool[Tensor, "#B 1 Q K"],
) -> Float[Tensor, "B N Q K"]:
    """Attention probabilities [G A.1]: softmax over [sink, scores / sqrt(H)]; the sink's own share is left out, so a
    row sums to at most 1."""
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    # The smallest finite number and not -inf: a row of padding that sees nothing must not become NaN.
    scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
    if sink is None:
        return scores.softmax(-1)
    logit = sink.to(scores).view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
    return torch.cat([logit, scores], -1).softmax(-1)[..., 1:]


def causal_attention(
    q: Float[Tensor, "B N T H"],
    k: Float[Tensor, "B N T H"],
    v: Float[Tensor, "B N T H"],
    sink: Float[Tensor, " N"] | None,
) -> Float[Tensor, "B N T H"]:
    """`attention_pattern(...) @ v` for whole sequences without padding, by torch's fused causal kernel.

    The sink becomes one more position in front: a key that scores `sink` with every query by way of one more channel
    (1 in each query, 0 in each ordinary key), and whose value is zero. The result is the same but for rounding. The
    values get an empty channel too, as the fused kernel takes no two widths.
    """
    if native(q):
        return kernels.causal_attention(q, k, v, sink)
    if sink is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    root = math.sqrt(q.shape[-1])
    logit = (sink.to(q) * root).view(1, -1, 1, 1).expand(q.shape[0], -1, 1, 1)
    key = torch.cat([F.pad(logit, (q.shape[-1], 0)), F.pad(k, (0, 1))], -2)
    query = F.pad(F.pad(q, (0, 1), value=1.0), (0, 0, 1, 0))
    value = F.pad(v, (0, 1, 1, 0))
    mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=1.0 / root)
    return mixed[..., 1:, :-1]


def split_heads(x: Float[Tensor, "B T C"], n_head: int) -> Float[Tensor, "B N T H"]:
    """Channels of head n are the n-th stretch of H."""
    return x.unflatten(-1, (n_head, -1)).transpose(1, 2)


def merge_heads(x: Float[Tensor, "B N T H"]) -> Float[Tensor, "B T C"]:
    """The inverse of `split_heads`."""
    return x.transpose(1, 2).flatten(-2)

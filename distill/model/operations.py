"""The operations under the one forward: each in plain torch, which is what a reader reads, and beside it compiled.

Each is a pure function of tensors. Where `native` says so a compiled form is used, that a test holds to the plain one;
`set_path` chooses between them for the whole process. A weight with a `Sample` attached (candidate mode) gets its
gradient only there, in both forms.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from distill.model import kernels
from distill.model.kernels.candidates import sample_of, sampled_embedding, sampled_linear
from distill.model.linear_path import chosen
from distill.model.path import PATHS, native, plain, set_path
from distill.model.topk import abs_topk

__all__ = [
    "ACTIVATIONS",
    "PATHS",
    "attention_pattern",
    "causal_attention",
    "cross_entropy",
    "embedding",
    "linear",
    "linear_topk",
    "logits",
    "merge_heads",
    "native",
    "norm_scale",
    "norm_topk",
    "plain",
    "scaled",
    "set_path",
    "split_heads",
    "visible",
]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}
"""Non-linearities by name; gelu is the exact one, gelu_new its tanh form."""


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


def norm_topk(
    x: Float[Tensor, "*rows D"],
    gain: Float[Tensor, " D"],
    bias: Float[Tensor, " D"] | None,
    *,
    center: bool,
    eps: float,
    k: int | None,
) -> Float[Tensor, "*rows D"]:
    """RMSNorm or LayerNorm, and AbsTopK of what comes out where `k` is given."""
    if native(x):
        return kernels.norm_topk(x, gain, bias, center=center, eps=eps, k=k)
    x = scaled(x, norm_scale(x, center=center, eps=eps), gain, bias, center=center)
    return x if k is None else abs_topk(x, k)


def linear_topk(
    x: Float[Tensor, "*rows i"],
    maps: Sequence[tuple[Tensor, Tensor | None]],
    *,
    activation: str = "identity",
    keep: Sequence[int | None] = (),
) -> tuple[Tensor, ...]:
    """For each map the activation of x W^T + b, and AbsTopK of that.

    Arguments:
        x: what all of the maps read.
        maps: weight (o, i) and bias (o) of each.
        activation: one of `ACTIVATIONS`.
        keep: for each map how many channels AbsTopK keeps, None for all; nothing stands for None everywhere.
    """
    keep = keep or [None] * len(maps)
    samples = [sample_of(weight) for weight, _ in maps]
    if native(x) and all(sample is None or sample.index is not None for sample in samples):
        sparse = [
            sample is not None or chosen(weight.shape[0], weight.shape[1], kernels.density(weight))
            for (weight, _), sample in zip(maps, samples, strict=True)
        ]
        sinks = [None if sample is None else sample.take for sample in samples]
        return kernels.linear_maps(x, maps, sparse=sparse, keep=keep, activation=activation, sinks=sinks)
    outs = [
        F.linear(x, weight, bias) if sample is None else sampled_linear(x, weight, bias, sample)
        for (weight, bias), sample in zip(maps, samples, strict=True)
    ]
    outs = [ACTIVATIONS[activation](out) for out in outs]
    return tuple(out if k is None else abs_topk(out, k) for out, k in zip(outs, keep, strict=True))


def linear(
    x: Float[Tensor, "*rows i"], weight: Float[Tensor, "o i"], bias: Float[Tensor, " o"] | None
) -> Float[Tensor, "*rows o"]:
    """x W^T + b: without the zeros of W where there are many."""
    return linear_topk(x, [(weight, bias)])[0]


def embedding(table: Float[Tensor, "V D"], ids: Int[Tensor, "*rows"]) -> Float[Tensor, "*rows D"]:
    """The rows of `table` that `ids` name."""
    sample = sample_of(table)
    if sample is not None:
        return sampled_embedding(ids, table, sample)
    return kernels.embedding(table, ids) if native(table) else F.embedding(ids, table)


def logits(
    x: Float[Tensor, "*rows D"],
    weight: Float[Tensor, "V D"],
    bias: Float[Tensor, " V"] | None,
    table: Float[Tensor, "V V"] | None,
    ids: Int[Tensor, "*rows"],
) -> Float[Tensor, "*rows V"]:
    """x W^T + b, and where there is a `table` the rows of it that `ids` name."""
    out = linear(x, weight, bias)
    if table is None:
        return out
    return kernels.add_rows_(out, table, ids) if native(out) else out + F.embedding(ids, table)


def cross_entropy(logits: Float[Tensor, "*rows V"], targets: Int[Tensor, "*rows"]) -> Float[Tensor, ""]:
    """Mean over the targets of -log softmax(logits)[target], in nats; negative targets do not count."""
    rows, targets = logits.flatten(0, -2), targets.flatten()
    if native(rows):
        return kernels.cross_entropy(rows, targets)
    return F.cross_entropy(rows, targets.masked_fill(targets < 0, -100), ignore_index=-100)


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

"""Attention heads in a circuit against the model: how far their patterns are apart, and which have gone uniform.

A head's pattern matters at the queries whose result the answer rests on, often the last token alone. So queries are
weighted by the effect of what attention writes there.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from distill.circuits.answers import answer_difference, frozen
from distill.circuits.faithfulness.runs import Runs
from distill.circuits.masks import ablated
from distill.circuits.tasks import TaskBatch
from distill.model.sites import Tap, chain

LEAST_KEYS = 3
"""Keys that a query has to see for its pattern to be called uniform or not."""


@dataclass(frozen=True, kw_only=True)
class Heads:
    """All heads of a model, layer after layer; NaN where attention writes nothing that the answer rests on."""

    names: tuple[str, ...]
    """`layer.head`."""
    distance: Float[Tensor, "heads"]
    """Jensen-Shannon distance between the patterns in circuit and model, the sink counted as a key; at most 0.833."""
    uniform_circuit: Float[Tensor, "heads"]
    """Jensen-Shannon distance of the circuit's patterns from uniform ones over the keys, without the sink."""
    uniform_model: Float[Tensor, "heads"]
    """The same for the model."""


def compare_heads(runs: Runs, batch: TaskBatch) -> Heads:
    """Patterns of all heads on the prompts of `batch` in the circuit and in the model."""
    weights = query_weights(runs, batch)
    with torch.no_grad():
        ours, theirs = (_patterns(runs, batch, tap) for tap in (runs.tap(), None))
        pairs = list(zip(ours, theirs, weights, strict=True))
        return Heads(
            names=tuple(f"{layer}.{head}" for layer, one in enumerate(ours) for head in range(one.shape[1])),
            distance=torch.cat([pattern_distance(one, other, weight) for one, other, weight in pairs]).cpu(),
            uniform_circuit=torch.cat([uniform_distance(one, weight) for one, _, weight in pairs]).cpu(),
            uniform_model=torch.cat([uniform_distance(other, weight) for _, other, weight in pairs]).cpu(),
        )


class _Patterns:
    """A tap that keeps attention patterns, layer after layer."""

    wants = frozenset({"pattern"})

    def __init__(self) -> None:
        self.values: list[Tensor] = []

    def __call__(self, site: str, x: Tensor, /) -> Tensor:
        if site.endswith(".pattern"):
            self.values.append(x)
        return x


def _patterns(runs: Runs, batch: TaskBatch, tap: Tap | None) -> Sequence[Float[Tensor, "B N T T"]]:
    keep = _Patterns()
    tokens = batch.tokens.to(runs.device)
    runs.model.run(tokens, tap=keep if tap is None else chain(tap, keep), stop="final_resid")
    return keep.values


class _Writes:
    """A tap that keeps what attention writes, with a handle for its gradient."""

    def __init__(self) -> None:
        self.handles: dict[str, Tensor] = {}
        self.values: dict[str, Tensor] = {}

    def __call__(self, site: str, x: Tensor, /) -> Tensor:
        if not site.endswith(".attn.resid_delta"):
            return x
        self.values[site] = x.detach()
        self.handles[site] = torch.zeros_like(x, requires_grad=True)
        return x + self.handles[site]


def query_weights(runs: Runs, batch: TaskBatch) -> list[Float[Tensor, "B T"]]:
    """For each layer the effect, to first order, of what attention writes at each token in the circuit.

    weight = sum over kept channels c of |dF/dx_c (x_c - a_c)|,  x the write, F the prompt's logit difference
    """
    keep = _Writes()
    with torch.enable_grad(), frozen(runs.model):
        total = answer_difference(runs.model, batch, chain(runs.tap(), keep)).sum()
        gradients = torch.autograd.grad(total, list(keep.handles.values()))
    found = []
    for (site, x), gradient in zip(keep.values.items(), gradients, strict=True):
        kept = runs.circuit.nodes[site].to(x)
        found.append((gradient * (x - ablated(x, site, runs.means)) * kept).abs().sum(-1))
    return found


def jensen_shannon(one: Float[Tensor, "*rows K"], other: Float[Tensor, "*rows K"]) -> Float[Tensor, "*rows"]:
    """Distance sqrt(KL(p || m) / 2 + KL(q || m) / 2) with m = (p + q) / 2, in nats before the root; at most 0.833."""
    p, q = one.double(), other.double()
    middle = (p + q) / 2
    divergence = sum((torch.xlogy(x, x) - torch.xlogy(x, middle)).sum(-1) for x in (p, q))
    assert isinstance(divergence, Tensor)
    return (divergence / 2).clamp_min(0).sqrt()


def pattern_distance(
    one: Float[Tensor, "B N T T"], other: Float[Tensor, "B N T T"], weight: Float[Tensor, "B T"]
) -> Float[Tensor, "N"]:
    """Distance of two patterns per head, weighted mean over queries; NaN without weight.

    What a row lacks to 1 is the sink's share, and counts as one more key.
    """
    whole = [torch.cat([x, (1 - x.sum(-1, keepdim=True)).clamp_min(0)], -1) for x in (one, other)]
    return _mean(jensen_shannon(*whole), weight[:, None].expand(one.shape[:3]))


def uniform_distance(pattern: Float[Tensor, "B N T T"], weight: Float[Tensor, "B T"]) -> Float[Tensor, "N"]:
    """Distance from uniform attention over the keys that a query sees, per head.

    Mean over queries with at least three keys, weighted, and weighted by what the sink leaves to the keys too: what a
    head would do with attention that it does not give is no matter. NaN without weight.
    """
    length = pattern.shape[-1]
    given = pattern.sum(-1, keepdim=True)
    seen = torch.ones(length, length, device=pattern.device, dtype=pattern.dtype).tril()
    even = (seen / seen.sum(-1, keepdim=True)).expand_as(pattern)
    distance = jensen_shannon(pattern / given.clamp_min(1e-12), even)
    judged = weight * (torch.arange(length, device=weight.device) + 1 >= LEAST_KEYS)
    return _mean(distance, given[..., 0] * judged[:, None])


def _mean(values: Float[Tensor, "B N T"], weight: Float[Tensor, "B N T"]) -> Float[Tensor, "N"]:
    """Weighted mean per head; NaN where nothing has weight, which no threshold catches."""
    weight = weight.double()
    return (values * weight).sum((0, 2)) / weight.sum((0, 2))

"""Attention patterns of the heads that a circuit uses, as a page shows them."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from distill.circuits.tasks import TaskBatch
from distill.model.run import Runnable
from distill.model.sites import Tap, chain

Span = tuple[int, int]
Head = tuple[int, int]
"""Layer and number."""


class _Patterns:
    """A tap that keeps attention patterns by layer."""

    wants = frozenset({"pattern"})

    def __init__(self) -> None:
        self.values: dict[int, Tensor] = {}

    def __call__(self, site: str, x: Tensor, /) -> Tensor:
        if site.endswith(".attn.pattern"):
            self.values[int(site.split(".", 1)[0])] = x.float().cpu()
        return x


def heads_of(model: Runnable, nodes: Mapping[str, Bool[Tensor, "width"]]) -> list[Head]:
    """The heads of which any q, k or v channel is kept, in the order of the run."""
    found = set()
    for layer in range(model.n_layer):
        for part in "qkv":
            location = f"{layer}.attn.{part}"
            found |= {(layer, head_of(model, location, c)) for c in nodes[location].nonzero()[:, 0].tolist()}
    return sorted(found)


def head_of(model: Runnable, location: str, channel: int) -> int:
    """The head of a q, k or v channel; where several heads share keys and values, the first that reads these."""
    shared = model.n_head * model.d_head // model.widths[location]
    return channel // model.d_head * shared


@torch.no_grad()
def percents(
    model: Runnable, heads: Sequence[Head], batch: TaskBatch, spans: Sequence[Span], tap: Tap | None = None
) -> list[list[list[int]]]:
    """Attention in whole percent for each head and prompt: the triangle of rows q and columns k <= q of the stretch
    that is shown, row after row. What a row lacks to 100 went to the sink or to tokens that are not shown."""
    if not heads:
        return []
    keep = _Patterns()
    tokens = batch.tokens.to(next(model.parameters()).device)
    model.run(tokens, tap=keep if tap is None else chain(tap, keep), stop="final_resid")
    return [
        [_triangle(keep.values[layer][row, head, start:stop, start:stop]) for row, (start, stop) in enumerate(spans)]
        for layer, head in heads
    ]


def patterns(model: Runnable, heads: Sequence[Head], batch: TaskBatch, spans: Sequence[Span]) -> list[dict[str, Any]]:
    """The heads with their attention in the model."""
    found = percents(model, heads, batch, spans)
    return [
        {"layer": layer, "head": head, "pattern": pattern} for (layer, head), pattern in zip(heads, found, strict=True)
    ]


def _triangle(pattern: Float[Tensor, "T T"]) -> list[int]:
    rows, columns = torch.tril_indices(*pattern.shape)
    return (100 * pattern[rows, columns]).round().int().tolist()

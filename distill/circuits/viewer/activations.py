"""What the nodes of a circuit do on text: activations in the model and in the circuit, and the examples to show.

All tensors have one column per node, in the order of `names_of`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from distill.circuits.viewer.settings import ViewConfig
from distill.model.run import Runnable
from distill.model.sites import Tap, chain

DIGITS = 3
"""Significant digits of activations and weights in a page."""
BATCH = 16
"""Rows in one run."""


class ChannelTap:
    """Keeps the chosen channels of each location."""

    def __init__(self, nodes: Mapping[str, Bool[Tensor, "width"]]) -> None:
        self.index = {location: mask.nonzero()[:, 0] for location, mask in nodes.items() if bool(mask.any())}
        self.values: dict[str, Tensor] = {}

    def __call__(self, site: str, x: Tensor, /) -> Tensor:
        if site in self.index:
            self.values[site] = x[..., self.index[site].to(x.device)]
        return x

    def columns(self, like: Tensor) -> Float[Tensor, "B T N"]:
        """Everything that was kept, side by side."""
        parts = [self.values[location].float().cpu() for location in self.index]
        return torch.cat(parts, -1) if parts else torch.empty(*like.shape, 0)


@torch.no_grad()
def activations(
    model: Runnable, nodes: Mapping[str, Bool[Tensor, "width"]], tokens: Int[Tensor, "B T"], tap: Tap | None = None
) -> Float[Tensor, "B T N"]:
    """Activations of some nodes at every token, in the model or, with the tap of a circuit, in that.

    Arguments:
        nodes: whose; a bool per channel by location.
        tokens: right-padded where they differ in length.
        tap: what else happens in the run, before the activations are read.
    """
    device = next(model.parameters()).device
    found = []
    for part in tokens.split(BATCH):
        keep = ChannelTap(nodes)
        model.run(part.to(device), tap=keep if tap is None else chain(tap, keep), stop="final_resid")
        found.append(keep.columns(part))
    return torch.cat(found)


def rounded(values: Tensor, digits: int = DIGITS) -> list[float | int]:
    """Values as plain numbers of a few significant digits; those without a fraction as integers, which are shorter."""
    found: list[float | int] = []
    for value in values.flatten().tolist():
        short = float(f"{value:.{digits}g}")
        found.append(int(short) if short.is_integer() else short)
    return found


@dataclass(frozen=True, kw_only=True)
class Example:
    """One token of the held-out text and what stands around it."""

    window: int
    """Row of the windows."""
    position: int
    """The token's place in the window."""
    start: int
    """First token that is shown."""
    stop: int
    """One past the last token that is shown."""
    group: str
    """`top`, `bottom`, or `q` and the quantile, `q0.9`."""

    def to_json(self, values: Float[Tensor, "n T"]) -> dict[str, object]:
        """The example with a node's activation at each token that is shown."""
        return {**vars(self), "values": rounded(values[self.window, self.start : self.stop])}


def examples(values: Float[Tensor, "n T"], config: ViewConfig) -> list[Example]:
    """Where one node is most, least and middlingly active: top, quantiles, bottom.

    Top and bottom examples are from different windows; bottom ones only where the node is below 0 there, as a node
    that is never negative has no other end. Quantiles are among the tokens where the node is not 0. A node that is 0
    everywhere has no examples.
    """
    length = values.shape[1]
    chosen = [(cell, "top") for cell in _extremes(values, config.top)]
    live = values.flatten().nonzero()[:, 0]
    if len(live):
        order = live[values.flatten()[live].argsort(stable=True)]
        for share in config.quantiles:
            cell = int(order[min(int(share * len(order)), len(order) - 1)])
            chosen.append(((cell // length, cell % length), f"q{share:g}"))
    chosen += [(cell, "bottom") for cell in _extremes(-values, config.bottom)]
    return [
        Example(
            window=window,
            position=position,
            start=max(0, position - config.before),
            stop=min(length, position + config.after + 1),
            group=group,
        )
        for (window, position), group in chosen
    ]


def _extremes(values: Float[Tensor, "n T"], count: int) -> list[tuple[int, int]]:
    """The largest value above 0 of each window, for the `count` windows where it is largest."""
    best = values.max(1)
    order = best.values.argsort(descending=True, stable=True)[:count]
    return [(int(window), int(best.indices[window])) for window in order if float(best.values[window]) > 0]


def correlations(ours: Float[Tensor, "R N"], theirs: Float[Tensor, "R N"]) -> list[float | None]:
    """Pearson correlation of each node's activations in circuit and model; None where one of them does not vary."""
    a, b = (x.double() - x.double().mean(0) for x in (ours, theirs))
    norms = a.norm(dim=0) * b.norm(dim=0)
    values = ((a * b).sum(0) / norms.clamp_min(1e-300)).tolist()
    return [round(value, 3) if norm > 1e-12 else None for value, norm in zip(values, norms.tolist(), strict=True)]


def counted(tokens: Sequence[int]) -> list[tuple[int, float]]:
    """Different tokens with their shares, the most frequent first, then by id."""
    counts: dict[int, int] = {}
    for token in tokens:
        counts[token] = counts.get(token, 0) + 1
    return [
        (token, count / len(tokens)) for token, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    ]

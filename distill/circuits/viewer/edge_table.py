"""Edges as a page holds them: two columns of places in its list of nodes."""

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from distill.circuits.edges import EdgeSet
from distill.circuits.masks import Nodes


@dataclass(frozen=True, kw_only=True)
class EdgeTable:
    """Edges by the places of their ends among nodes in the order of `names_of`."""

    source: Int[Tensor, "n"]
    """Place of each edge's source."""
    target: Int[Tensor, "n"]
    """Place of its target."""

    def codes(self) -> Int[Tensor, "n"]:
        """One number per edge, different for different edges."""
        return (self.source << 32) | self.target

    def chosen(self, order: Int[Tensor, "m"]) -> "EdgeTable":
        """Some of the edges, in this order."""
        return EdgeTable(source=self.source[order], target=self.target[order])

    def places_of(self, others: "EdgeTable") -> tuple[Int[Tensor, "m"], Int[Tensor, "m"]]:
        """Where edges of this table stand among `others`: their places there, in rising order, and here."""
        codes, wanted = self.codes(), others.codes()
        if not len(codes):
            return codes, codes
        order = codes.argsort()
        at = order[torch.searchsorted(codes[order], wanted).clamp_max(len(codes) - 1)]
        found = codes[at] == wanted
        return found.nonzero()[:, 0], at[found]


def edge_table(edges: EdgeSet, nodes: Nodes) -> EdgeTable:
    """A set of edges between `nodes`, matrix after matrix."""
    places: dict[str, Tensor] = {}
    start = 0
    for location, mask in nodes.items():
        places[location] = torch.cumsum(mask.cpu().long(), 0) - 1 + start
        start += int(mask.sum())
    none = [torch.empty(0, dtype=torch.long)]
    return EdgeTable(
        source=torch.cat([places[source][index[1]] for (source, _), index in edges.items()] or none),
        target=torch.cat([places[target][index[0]] for (_, target), index in edges.items()] or none),
    )

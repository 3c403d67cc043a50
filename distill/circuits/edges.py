"""Edges of a circuit: sets of them, how a model runs without some of them, and how they are thinned out.

A dropped edge still contributes the ablation value of its source:

    z_j = b_j + sum_i W_ji (a_i + e_ji (x_i - a_i))

with x_i the source in the run, a_i what it would be if it were masked out, and e_ji 0 for a dropped edge, 1 for one
that is kept. So a node whose edges are all dropped acts as a node that is dropped itself.

Attention stands between a value and the writes that it reaches: there x_i and a_i are what attention makes of the
values v_i and of their ablation values. The two differ even where a_i is a constant, as an attention sink leaves the
rows of the pattern with a sum below 1.

`EdgeTap` is this definition under the one forward of any model. `distill.circuits.standalone` computes the same from
the kept nodes and edges alone.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from distill.circuits.ablation import Means
from distill.circuits.masks import MaskTap, ablated
from distill.model import operations as ops
from distill.model.anatomy import FED_BY, activation, anatomy
from distill.model.run import Runnable
from distill.model.sites import Tap, chain, kind_of, node_name

Matrix = tuple[str, str]
"""One matrix of edges: (source location, target location)."""
EdgeSet = dict[Matrix, Tensor]
"""A set of edges: for each matrix (2, n) int64, target above source channels, sorted by target, then source."""


def induced_edge_set(model: Runnable, nodes: Mapping[str, Bool[Tensor, "width"]]) -> EdgeSet:
    """Every non-zero weight between two kept nodes [G 2.2], for each matrix of the model."""
    found: EdgeSet = {}
    for (source, target), weight in model.matrices().items():
        columns, rows = (nodes[location].nonzero()[:, 0] for location in (source, target))
        block = weight[rows.to(weight.device)][:, columns.to(weight.device)].cpu()
        at_row, at_column = block.nonzero().unbind(1)
        found[source, target] = torch.stack([rows[at_row], columns[at_column]])
    return found


def checked_edges(edges: Mapping[Matrix, Tensor], nodes: Mapping[str, Bool[Tensor, "width"]]) -> EdgeSet:
    """The same edges, sorted, with an entry for each matrix that `nodes` could have edges in.

    ValueError for a pair of locations that no matrix joins, a wrong shape or type, an index out of range, an edge
    whose ends are not both kept, or one that stands there twice.
    """
    found: EdgeSet = {}
    for target in nodes:
        source = target.removesuffix(kind_of(target)) + FED_BY.get(kind_of(target), "")
        if source in nodes:
            found[source, target] = torch.empty(2, 0, dtype=torch.long)
    for (source, target), index in edges.items():
        name = f"{source} -> {target}"
        if (source, target) not in found:
            raise ValueError(f"edges: {name!r} is no matrix of this circuit's model; allowed are {_named(found)}")
        if index.dim() != 2 or index.shape[0] != 2 or index.is_floating_point():
            raise ValueError(
                f"edges: {name} has shape {tuple(index.shape)} and type {index.dtype}; allowed are (2, n) whole numbers"
            )
        index = index.long().cpu()
        for row, location in zip(index, (target, source), strict=True):
            width = len(nodes[location])
            if len(row) and not 0 <= int(row.min()) <= int(row.max()) < width:
                raise ValueError(
                    f"edges: {name} names channels {int(row.min())} to {int(row.max())} of {location}; "
                    f"allowed are 0 to {width - 1}"
                )
            outside = row[~nodes[location].cpu()[row]]
            if len(outside):
                raise ValueError(
                    f"edges: {name} has an edge at {node_name(location, int(outside[0]))}, "
                    "which is no node of the circuit"
                )
        codes = _codes(index).sort().values
        if bool((codes[1:] == codes[:-1]).any()):
            raise ValueError(f"edges: {name} has an edge twice")
        found[source, target] = _indices(codes)
    return found


def _named(matrices: Mapping[Matrix, Tensor]) -> str:
    return ", ".join(f"{source} -> {target}" for source, target in matrices)


def _codes(index: Int[Tensor, "2 n"]) -> Int[Tensor, "n"]:
    """One number per edge, ordered by target, then source."""
    return (index[0] << 32) | index[1]


def _indices(codes: Int[Tensor, "n"]) -> Int[Tensor, "2 n"]:
    return torch.stack([codes >> 32, codes & 0xFFFFFFFF])


def edge_total(edges: Mapping[Matrix, Int[Tensor, "2 n"]]) -> int:
    """Number of edges in a set."""
    return sum(index.shape[1] for index in edges.values())


def edge_union(one: EdgeSet, other: EdgeSet) -> EdgeSet:
    """Edges in either set."""
    return _joined(one, other, lambda mine, theirs: torch.cat([mine, theirs]).unique())


def edge_intersection(one: EdgeSet, other: EdgeSet) -> EdgeSet:
    """Edges in both sets."""
    return _joined(one, other, lambda mine, theirs: mine[torch.isin(mine, theirs)])


def edge_difference(one: EdgeSet, other: EdgeSet) -> EdgeSet:
    """Edges in the first set and not in the other."""
    return _joined(one, other, lambda mine, theirs: mine[~torch.isin(mine, theirs)])


def _joined(one: EdgeSet, other: EdgeSet, join: Callable[[Tensor, Tensor], Tensor]) -> EdgeSet:
    none = torch.empty(2, 0, dtype=torch.long)
    return {
        matrix: _indices(join(_codes(one.get(matrix, none)), _codes(other.get(matrix, none)))) for matrix in one | other
    }


def edges_between(edges: EdgeSet, nodes: Mapping[str, Bool[Tensor, "width"]]) -> EdgeSet:
    """Those edges whose ends are both among `nodes`."""
    return {
        (source, target): index[:, nodes[target].cpu()[index[0]] & nodes[source].cpu()[index[1]]]
        for (source, target), index in edges.items()
    }


def chosen_edges(edges: EdgeSet, kept: Bool[Tensor, "n"]) -> EdgeSet:
    """Some edges of a set; `kept` runs over its matrices one after the other."""
    parts = kept.cpu().split([index.shape[1] for index in edges.values()])
    return {matrix: index[:, part] for (matrix, index), part in zip(edges.items(), parts, strict=True)}


# The run without some edges.


@dataclass(frozen=True, kw_only=True)
class _Removed:
    """The removed edges of one matrix, as the small block of rows and columns that they touch."""

    target: str
    rows: Int[Tensor, "r"]
    columns: Int[Tensor, "c"]
    place: tuple[Int[Tensor, "n"], Int[Tensor, "n"]]
    """Row and column of each removed edge in the block."""
    values: Float[Tensor, "n"]
    """Weights of the removed edges."""
    into: Float[Tensor, "r source"] | None
    """All weights into the rows, where what they add up to has to be computed anew."""
    bias: Float[Tensor, "r"] | None

    def correction(
        self, lack: Float[Tensor, "*rows source"], gate: Float[Tensor, "n"] | None
    ) -> Float[Tensor, "*rows r"]:
        """sum_i W_ji (1 - e_ji) lack_i at each of the rows."""
        values = self.values if gate is None else self.values * (1 - gate.to(self.values))
        block = self.values.new_zeros(len(self.rows), len(self.columns)).index_put(self.place, values)
        return torch.nn.functional.linear(lack[..., self.columns], block)


class EdgeTap:
    """A tap that drops edges; see the module's docstring. To be chained behind the `MaskTap` of the nodes.

    Args:
        model: the model that is to be run.
        removed: the edges to drop, between kept nodes.
        means: ablation values.
        gates: e of each removed edge by matrix, (n,) in the order of `removed`; none drops them altogether. Gradients
            pass, so that one run with all edges `removed` at e = 1 gives the gradient to each of them.

    A run's pre-activations are worked out anew from what is read where a neuron loses an edge, so edges can be dropped
    without a place of their own in the forward pass. Where edges from values are dropped the tap asks for attention
    patterns, which takes the slower path through attention.
    """

    def __init__(
        self,
        model: Runnable,
        removed: EdgeSet,
        means: Means,
        gates: Mapping[Matrix, Float[Tensor, "n"]] | None = None,
    ) -> None:
        parts, weights = anatomy(model), model.matrices()
        if edge_total(removed) and parts.uncut:
            raise ValueError(f"edges: the model has {' and '.join(parts.uncut)}, no single edge of it can be cut")
        self.means, self.gates, self.n_head = means, dict(gates or {}), model.n_head
        self.activation = activation(parts.activation)
        self.removed: dict[str, list[_Removed]] = {}
        for (source, target), index in removed.items():
            if not index.shape[1]:
                continue
            weight = weights[source, target]
            index = index.to(weight.device)
            rows, at_row = index[0].unique(return_inverse=True)
            columns, at_column = index[1].unique(return_inverse=True)
            neurons = target.endswith("post_act")
            self.removed.setdefault(source, []).append(
                _Removed(
                    target=target,
                    rows=rows,
                    columns=columns,
                    place=(at_row, at_column),
                    values=weight[index[0], index[1]],
                    into=weight[rows] if neurons else None,
                    bias=parts.biases[target][rows] if neurons else None,
                )
            )
        self.wants = frozenset({"pre"})
        if any(source.endswith("attn.v") for source in self.removed):
            self.wants |= {"pattern"}
        self.pending: dict[str, tuple[_Removed, Tensor]] = {}
        self.lack: dict[str, Tensor] = {}

    def __call__(self, site: str, x: Tensor, /) -> Tensor:
        location, _, extra = site.rpartition(".")
        if extra == "pattern":
            return self._mix(f"{location}.v", x)
        target = location if extra == "pre" else site
        if target in self.pending:
            x = self._drop(target, x)
        if site in self.removed:
            lack = ablated(x, site, self.means) - x
            if site.endswith("attn.v"):
                self.lack[site] = lack
            else:
                self._spread(site, x, lack)
        return x

    def _mix(self, source: str, pattern: Float[Tensor, "B N T T"]) -> Float[Tensor, "B N T T"]:
        if source in self.lack:
            mixed = ops.merge_heads(pattern @ ops.split_heads(self.lack.pop(source), self.n_head))
            self._spread(source, mixed, mixed)
        return pattern

    def _spread(self, source: str, x: Tensor, lack: Tensor) -> None:
        for part in self.removed[source]:
            change = part.correction(lack, self.gates.get((source, part.target)))
            if part.into is not None:
                change = change + torch.nn.functional.linear(x, part.into, part.bias)
            self.pending[part.target] = (part, change)

    def _drop(self, target: str, x: Float[Tensor, "B T width"]) -> Float[Tensor, "B T width"]:
        part, change = self.pending.pop(target)
        if part.into is None:
            return x.index_add(-1, part.rows, change)
        return x.index_copy(-1, part.rows, self.activation(change))


def circuit_tap(
    model: Runnable,
    nodes: Mapping[str, Bool[Tensor, "width"]],
    means: Means,
    edges: EdgeSet | None = None,
    *,
    competition: bool = False,
) -> Tap:
    """A tap under which `model` runs only these nodes and edges; without `edges` all that join the nodes."""
    mask = MaskTap(nodes, means, competition=competition)
    if edges is None:
        return mask
    removed = edge_difference(induced_edge_set(model, nodes), edges)
    return chain(mask, EdgeTap(model, removed, means)) if edge_total(removed) else mask

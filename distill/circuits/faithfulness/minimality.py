"""Minimality: is every node, and every edge, of the circuit needed for what it does?"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from distill.circuits.answers import two_way_loss
from distill.circuits.circuit import Circuit
from distill.circuits.edges import EdgeSet, chosen_edges, edge_total
from distill.circuits.faithfulness.check import Check, verdict_of
from distill.circuits.faithfulness.effects import edge_changes, loss_changes
from distill.circuits.faithfulness.limits import Limits
from distill.circuits.faithfulness.runs import Runs
from distill.circuits.faithfulness.statistics import spread_of
from distill.circuits.masks import Nodes
from distill.circuits.tasks import TaskBatch
from distill.model.run import Runnable
from distill.model.sites import Tap, chain, layer_of, residual_sites


def minimality(
    model: Runnable,
    circuit: Circuit,
    batch: TaskBatch,
    *,
    limits: Limits | None = None,
    runs: Runs | None = None,
) -> Check:
    """The share of the circuit's nodes without effect.

        change_i = L(C without i) - L(C),  without effect: change_i < `no_effect` * target

    in nats per prompt; to be better off without a node counts as no effect. The same for edges. Of more than
    `single_nodes` nodes (`single_edges` edges) those are left out in turn of which the gradient says that they matter
    least, and the rest are taken to have an effect, so that the share is a lower bound. Flagged where any node has no
    effect, and any edge in a circuit whose edges were pruned. CircuitMismatchError for a circuit of another model.
    """
    limits, runs = limits or Limits(), runs or Runs(model, circuit)
    bound = limits.no_effect * circuit.target
    nodes = _least([(location, int(c)) for location, mask in circuit.nodes.items() for c in mask.nonzero()[:, 0]],
                   _flat(loss_changes(runs, batch, circuit.nodes), circuit.nodes), limits.single_nodes)  # fmt: skip
    edges = runs.edges
    suspects = _least(list(range(edge_total(edges))), edge_changes(runs, batch), limits.single_edges)
    with torch.no_grad():
        stretch = _Stretch(runs, batch)
        by_node = torch.tensor([stretch.loss(location, _without_node(runs, location, channel))
                                for location, channel in nodes.tried], dtype=torch.float64) - stretch.all  # fmt: skip
        by_edge = torch.tensor([stretch.loss(_source(edges, place), _without_edge(runs, place))
                                for place in suspects.tried], dtype=torch.float64) - stretch.all  # fmt: skip
    idle, loose = int((by_node < bound).sum()), int((by_edge < bound).sum())
    value, share_edges = idle / max(nodes.total, 1), loose / max(suspects.total, 1)
    pruned = circuit.kept_edges is not None
    complaints = [
        f"{count} of {tried.total} {what}{f' ({len(tried.tried)} tried)' if len(tried.tried) < tried.total else ''} "
        f"can go at less than {limits.no_effect:.0%} of the target"
        for what, count, tried in (("nodes", idle, nodes), ("edges", loose if pruned else 0, suspects))
        if count
    ]
    verdict, reason = verdict_of(complaints, f"each of the {len(nodes.tried)} nodes tried has an effect")
    return Check(
        name="minimality",
        value=value,
        threshold=0.0,
        verdict=verdict,
        reason=reason,
        n=len(batch),
        details={
            "nodes": float(nodes.total),
            "nodes_tried": float(len(nodes.tried)),
            "edges": float(suspects.total),
            "edges_tried": float(len(suspects.tried)),
            "edges_without_effect": share_edges,
            **(spread_of("node_change", by_node) if len(by_node) else {}),
            **(spread_of("edge_change", by_edge) if len(by_edge) else {}),
        },
    )


@dataclass(frozen=True)
class _Least:
    tried: list
    total: int


def _least(things: Sequence, changes: Float[Tensor, "n"], most: int) -> _Least:
    """The `most` things that matter least, and how many things there are."""
    order = torch.argsort(changes, stable=True)[:most].tolist()
    return _Least([things[place] for place in order], len(things))


def _flat(values: dict[str, Tensor], nodes: Nodes) -> Float[Tensor, "n"]:
    return torch.cat([values[location][mask] for location, mask in nodes.items()])


def _without_node(runs: Runs, location: str, channel: int) -> Tap:
    mask = runs.circuit.nodes[location].clone()
    mask[channel] = False
    return runs.tap({**runs.circuit.nodes, location: mask})


def _without_edge(runs: Runs, place: int) -> Tap:
    kept = torch.ones(edge_total(runs.edges), dtype=torch.bool)
    kept[place] = False
    return runs.tap(edges=chosen_edges(runs.edges, kept))


def _source(edges: EdgeSet, place: int) -> str:
    for (source, _), index in edges.items():
        if place < index.shape[1]:
            return source
        place -= index.shape[1]
    raise AssertionError(f"edge {place} beyond the last one")


class _Stretch:
    """Runs of the circuit from the sublayer on in which something is left out: what comes before stays as it was."""

    def __init__(self, runs: Runs, batch: TaskBatch) -> None:
        self.runs, self.batch = runs, batch
        self.tokens, self.last = batch.tokens.to(runs.device), batch.last.to(runs.device)
        self.stream: dict[str, Tensor] = {}
        self.sites = frozenset(residual_sites(runs.model.n_layer))
        self.all = self._loss(runs.model.run(self.tokens, tap=chain(runs.tap(), self._keep), stop="final_resid"))

    def _keep(self, site: str, x: Tensor, /) -> Tensor:
        if site in self.sites:
            self.stream[site] = x
        return x

    def loss(self, location: str, tap: Tap) -> float:
        """Task loss under a tap that differs from the circuit's in the sublayer of a location, and not before."""
        start = f"{layer_of(location)}.{'resid_in' if '.attn.' in location else 'resid_mid'}"
        run = self.runs.model.run(self.tokens, tap=tap, start=start, residual=self.stream[start], stop="final_resid")
        return self._loss(run)

    def _loss(self, stream: Tensor) -> float:
        rows = torch.arange(len(self.last), device=self.last.device)
        logits = self.runs.model.readout(stream[rows, self.last], self.tokens[rows, self.last])
        return float(two_way_loss(self.runs.difference(self.batch, logits.float())))

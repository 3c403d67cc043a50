"""Minimality: is every node, and every edge, of the circuit needed for what it does?"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from distill.circuits.answers import two_way_loss
from distill.circuits.circuit import Circuit
from distill.circuits.edges import EdgeSet, chosen_edges, edge_total
from distill.circuits.faithfulness.check import Check, skipped, verdict_of
from distill.circuits.faithfulness.effects import edge_changes, loss_changes
from distill.circuits.faithfulness.limits import Limits
from distill.circuits.faithfulness.runs import Runs
from distill.circuits.faithfulness.statistics import spread_of
from distill.circuits.masks import Nodes
from distill.circuits.tasks import TaskBatch
from distill.model.anatomy import anatomy
from distill.model.run import Runnable


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

    in nats per prompt; to be better off without a node counts as no effect. The same for edges, where the model has
    such as can be cut (`Anatomy.uncut`). Of more than
    `single_nodes` nodes (`single_edges` edges) those are left out in turn of which the gradient says that they matter
    least, and the rest are taken to have an effect, so that the share is a lower bound. Flagged where any node has no
    effect, and any edge in a circuit whose edges were pruned; skipped for a circuit without nodes.
    CircuitMismatchError for a circuit of another model.
    """
    limits, runs = limits or Limits(), runs or Runs(model, circuit)
    if not circuit.n_nodes:
        return skipped("minimality", "the circuit has no nodes", n=len(batch))
    bound = limits.no_effect * circuit.target
    nodes = _least([(location, int(c)) for location, mask in circuit.nodes.items() for c in mask.nonzero()[:, 0]],
                   _flat(loss_changes(runs, batch, circuit.nodes), circuit.nodes), limits.single_nodes)  # fmt: skip
    # Where nodes are joined by more than a weight there is no single edge to leave out.
    edges = {} if anatomy(model).uncut else runs.edges
    changes = edge_changes(runs, batch) if edges else torch.zeros(0)
    suspects = _least(list(range(edge_total(edges))), changes, limits.single_edges)
    loss = float(two_way_loss(runs.of(batch)))
    by_node = _changes(loss, [runs.of(batch, _without_node(circuit.nodes, *node)) for node in nodes.tried])
    by_edge = _changes(loss, [runs.of(batch, edges=_without_edge(edges, place)) for place in suspects.tried])
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


def _changes(loss: float, differences: Sequence[Tensor]) -> Float[Tensor, "n"]:
    return torch.tensor([float(two_way_loss(one)) - loss for one in differences], dtype=torch.float64)


def _without_node(nodes: Nodes, location: str, channel: int) -> Nodes:
    mask = nodes[location].clone()
    mask[channel] = False
    return {**nodes, location: mask}


def _without_edge(edges: EdgeSet, place: int) -> EdgeSet:
    kept = torch.ones(edge_total(edges), dtype=torch.bool)
    kept[place] = False
    return chosen_edges(edges, kept)

"""One circuit of a view: which of the nodes and edges are its own, what they are worth, what they do in it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from distill.circuits.answers import two_way_loss
from distill.circuits.circuit import Circuit
from distill.circuits.faithfulness.effects import edge_changes, loss_changes, node_effects
from distill.circuits.faithfulness.runs import Runs
from distill.circuits.masks import Nodes
from distill.circuits.tasks import TaskBatch
from distill.circuits.viewer.activations import activations, correlations, rounded
from distill.circuits.viewer.attention import Head, Span, percents
from distill.circuits.viewer.edge_table import EdgeTable, edge_table
from distill.circuits.viewer.settings import ViewConfig

EXACT, FIRST_ORDER = "left out one by one", "first order"


@dataclass(frozen=True, kw_only=True)
class Shared:
    """What all circuits of a view have in common."""

    nodes: Nodes
    """Union of their nodes."""
    names: Sequence[str]
    """Names of these."""
    edges: EdgeTable
    """Union of their edges, as it is shown."""
    shown: TaskBatch
    """Prompts that are shown."""
    spans: Sequence[Span]
    """Which tokens of each."""
    judged: TaskBatch
    """Prompts that effects are measured on."""
    judged_model: Float[Tensor, "R T N"]
    """Activations of the nodes in the model on these."""
    heads: Sequence[Head]
    """Heads that any of the circuits uses."""
    config: ViewConfig
    """How much is shown."""


def point(runs: Runs, shared: Shared) -> dict[str, Any]:
    """One circuit as places of nodes and edges in the view, with losses, counts, effects and activations.

    `effect` is the change of the task loss on leaving a node out, in nats; `pushes` the node's share in the logit
    difference between right and wrong answer, by integrated gradients; `edge_effect` the change of the task loss on
    leaving an edge out, to first order.
    """
    circuit, model = runs.circuit, runs.model
    mine = _flat(circuit.nodes)[_flat(shared.nodes)]
    places = mine.nonzero()[:, 0]
    effect, how = _effects(runs, shared)
    pushes = _kept(node_effects(runs, shared.judged, circuit.nodes), shared.nodes)
    ours = activations(model, shared.nodes, shared.shown.tokens, runs.tap())
    correlation = _correlations(runs, shared)
    edge_places, own = edge_table(runs.edges, shared.nodes).places_of(shared.edges)
    edge_effect = edge_changes(runs, shared.judged)[own] if len(own) else torch.empty(0)
    return {
        "target": circuit.target,
        "losses": {name: _number(value) for name, value in circuit.losses.items()},
        "counts": {name: _number(value) for name, value in circuit.counts(model).items()},
        "label": circuit.provenance.get("label") or "",
        "nodes": places.tolist(),
        "effect": rounded(effect[places]),
        "effect_kind": how,
        "pushes": rounded(pushes[places]),
        "correlation": [correlation[place] for place in places.tolist()],
        "edges": edge_places.tolist(),
        "edge_effect": rounded(edge_effect),
        "pairs": [
            [rounded(ours[row, start:stop, place]) for row, (start, stop) in enumerate(shared.spans)]
            for place in places.tolist()
        ],
        "heads": percents(model, shared.heads, shared.shown, shared.spans, runs.tap()),
    }


def _effects(runs: Runs, shared: Shared) -> tuple[Float[Tensor, "N"], str]:
    """Change of the task loss on leaving each node out, for all nodes of the view, and how it was measured."""
    circuit, batch = runs.circuit, shared.judged
    if circuit.n_nodes > shared.config.exact:
        return _kept(loss_changes(runs, batch, circuit.nodes), shared.nodes), FIRST_ORDER
    whole = float(two_way_loss(runs.of(batch)))
    found = {location: torch.zeros(len(mask)) for location, mask in circuit.nodes.items()}
    for location, mask in circuit.nodes.items():
        for channel in mask.nonzero()[:, 0].tolist():
            found[location][channel] = float(two_way_loss(runs.of(batch, _without(circuit, location, channel)))) - whole
    return _kept(found, shared.nodes), EXACT


def _without(circuit: Circuit, location: str, channel: int) -> Nodes:
    mask = circuit.nodes[location].clone()
    mask[channel] = False
    return {**circuit.nodes, location: mask}


def _correlations(runs: Runs, shared: Shared) -> list[float | None]:
    tokens = (torch.arange(shared.judged.tokens.shape[1]) <= shared.judged.last[:, None]).flatten()
    ours = activations(runs.model, shared.nodes, shared.judged.tokens, runs.tap())
    return correlations(ours.flatten(0, 1)[tokens], shared.judged_model.flatten(0, 1)[tokens])


def _kept(values: dict[str, Tensor], nodes: Nodes) -> Float[Tensor, "N"]:
    return torch.cat([values[location][mask] for location, mask in nodes.items()])


def _flat(nodes: Nodes) -> Tensor:
    return torch.cat(list(nodes.values()))


def _number(value: float | int) -> float:
    return float(f"{value:.4g}")

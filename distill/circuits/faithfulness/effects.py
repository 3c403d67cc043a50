"""What single nodes do to the answer, to first order: one backward pass instead of a run per node."""

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from distill.circuits.answers import answer_difference, frozen, two_way_loss
from distill.circuits.edges import EdgeTap, edge_union
from distill.circuits.faithfulness.runs import Runs
from distill.circuits.masks import MaskTap
from distill.circuits.tasks import TaskBatch
from distill.model.sites import chain

Effects = dict[str, Tensor]
"""A number for every node, by location."""


def node_effects(
    runs: Runs, batch: TaskBatch, nodes: Mapping[str, Bool[Tensor, "width"]], *, points: int = 4
) -> Effects:
    """Integrated gradients of the mean logit difference F along the line from no node to `nodes`, signed.

        effect_i = mean over t of dF/dm_i at m = t on `nodes` and 0 elsewhere,  t = (j + 1/2) / points

    In logits; without AbsTopK's switches the effects add up to F(nodes) - F(no node). 0 outside `nodes`.
    """
    total: Effects = {location: torch.zeros(len(mask)) for location, mask in nodes.items()}
    for point in range(points):
        at = {location: mask.float() * ((point + 0.5) / points) for location, mask in nodes.items()}
        for location, gradient in _gradients(runs, batch, at, torch.mean, pruned=runs.holds(dict(nodes))).items():
            total[location] += gradient * nodes[location] / points
    return total


def loss_changes(runs: Runs, batch: TaskBatch, nodes: Mapping[str, Bool[Tensor, "width"]]) -> Effects:
    """First-order change of the task loss in nats on leaving out each of `nodes` from them; 0 outside.

    change_i = -dL/dm_i at m = 1 on `nodes` and 0 elsewhere
    """
    at = {location: mask.float() for location, mask in nodes.items()}
    found = _gradients(runs, batch, at, two_way_loss, pruned=runs.holds(dict(nodes)))
    return {location: -gradient * nodes[location] for location, gradient in found.items()}


def edge_changes(runs: Runs, batch: TaskBatch) -> Float[Tensor, "edges"]:
    """First-order change of the task loss in nats on leaving out each edge of the circuit, in `runs.edges`' order.

    change_e = -dL/de at e = 1 on the circuit's edges, 0 on those that were pruned
    """
    every = edge_union(runs.edges, runs.dropped)
    gates = {matrix: _member(index, runs.edges[matrix]).to(runs.device) for matrix, index in every.items()}
    leaves = {matrix: gate.float().requires_grad_() for matrix, gate in gates.items() if len(gate)}
    if not leaves:
        return torch.zeros(0)
    with torch.enable_grad(), frozen(runs.model):
        tap = chain(MaskTap(runs.circuit.nodes, runs.means), EdgeTap(runs.model, every, runs.means, leaves))
        loss = two_way_loss(answer_difference(runs.model, batch, tap))
        gradients = torch.autograd.grad(loss, list(leaves.values()))
    return torch.cat([
        -gradient[gates[matrix]].float().cpu() for matrix, gradient in zip(leaves, gradients, strict=True)
    ])  # fmt: skip


def _member(index: Int[Tensor, "2 n"], of: Int[Tensor, "2 m"]) -> Bool[Tensor, "n"]:
    """Which edges of one matrix are among others of it."""
    return torch.isin(index[0] << 32 | index[1], of[0] << 32 | of[1])


def _gradients(
    runs: Runs, batch: TaskBatch, at: Mapping[str, Tensor], score: Callable[[Tensor], Tensor], *, pruned: bool
) -> dict[str, Tensor]:
    masks = {location: value.clone().to(runs.device).requires_grad_() for location, value in at.items()}
    with torch.enable_grad(), frozen(runs.model):
        difference = answer_difference(runs.model, batch, runs.parted(masks, pruned=pruned))
        gradients = torch.autograd.grad(score(difference), list(masks.values()), allow_unused=True)
    # Unused is a node that nothing reads, such as one of a model whose last sublayer was cut.
    return {
        location: torch.zeros_like(at[location]) if gradient is None else gradient.detach().float().cpu()
        for location, gradient in zip(masks, gradients, strict=True)
    }

"""Faithfulness curve: how much of the model's answer comes back as the circuit grows to the whole model.

The measures are those of the Mechanistic Interpretability Benchmark (Mueller et al. 2025): the area under the curve
(CPR) and the area between it and 1 (CMD).
"""

from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor

from distill.circuits.circuit import Circuit
from distill.circuits.faithfulness.check import Check, said, skipped, verdict_of
from distill.circuits.faithfulness.effects import node_effects
from distill.circuits.faithfulness.limits import Limits
from distill.circuits.faithfulness.runs import Runs
from distill.circuits.masks import Nodes, all_nodes
from distill.circuits.tasks import TaskBatch
from distill.model.run import Runnable


def curve(
    model: Runnable,
    circuit: Circuit,
    batch: TaskBatch,
    *,
    limits: Limits | None = None,
    runs: Runs | None = None,
) -> Check:
    """The largest share of the model's logit difference that a circuit of any size gives.

        f(k) = (m(C_k) - m(0)) / (m(M) - m(0)),  m = mean logit difference, 0 = every node ablated
        CPR  = area under f, CMD = area under |1 - f|, over shares of the model's edges from 0 to 1 (trapezoids)

    a ratio of means. C_k are the first nodes, as many as have at most k edges among them, in the order: the circuit's
    nodes by |effect|, then all others by |effect| (`node_effects` in the whole model). k runs over `curve_shares` of
    the model's edges and over `curve_edges`; the circuit itself is `f_circuit`. Flagged where f exceeds `curve_most`:
    the circuit answers more strongly than the model, which other nodes hold back; skipped where m(M) is not above m(0).
    CircuitMismatchError for a circuit of another model.
    """
    limits, runs = limits or Limits(), runs or Runs(model, circuit)
    everything = all_nodes(model.widths)
    effects = node_effects(runs, batch, everything)
    with torch.no_grad():
        empty, full = (float(runs.difference(batch, logits).mean()) for logits in (runs.empty(batch), runs.full(batch)))
        if full <= empty:
            words = f"the model's logit difference, {said(full)}, is not above that without any node, {said(empty)}"
            return skipped("curve", words, n=len(batch))
        rank = ranking(circuit.nodes, effects)
        edges = edges_by_rank(model, rank)
        total = int(edges[-1])

        def share_at(most: float | int) -> float:
            count = int((edges <= most).sum()) - 1
            nodes = {location: places < count for location, places in rank.items()}
            return (float(runs.of(batch, nodes).mean()) - empty) / (full - empty)

        shares = {share: share_at(share * total) for share in sorted(limits.curve_shares)}
        absolute = {most: share_at(most) for most in sorted(limits.curve_edges) if most < total}
        ours = (float(runs.difference(batch, runs.ours(batch)).mean()) - empty) / (full - empty)
    cpr, cmd = areas(shares)
    sizes = {"by itself": ours}
    sizes |= {f"grown to {share:.3g} of the edges": value for share, value in shares.items()}
    sizes |= {f"at {most} edges": value for most, value in absolute.items()}
    largest = max(sizes, key=lambda size: sizes[size])
    highest = sizes[largest]
    seen = f"{largest} it gives {highest:.2f} times the model's logit difference ({ours:.2f} by itself)"
    complaints = [f"{seen}: what is left out holds it back"] if highest > limits.curve_most else []
    verdict, reason = verdict_of(complaints, seen)
    return Check(
        name="curve",
        value=highest,
        threshold=limits.curve_most,
        verdict=verdict,
        reason=reason,
        n=len(batch),
        details={
            "f_circuit": ours,
            "CPR": cpr,
            "CMD": cmd,
            "edges_model": float(total),
            **{f"f_{share:.3g}": value for share, value in shares.items()},
            **{f"f_{most}_edges": value for most, value in absolute.items()},
        },
    )


def areas(shares: Mapping[float, float]) -> tuple[float, float]:
    """CPR and CMD of f at shares of the edges; f(0) = 0, and beyond the largest share f is taken to stay."""
    x = torch.tensor([0.0, *shares, 1.0], dtype=torch.float64)
    f = torch.tensor([0.0, *shares.values(), list(shares.values())[-1]], dtype=torch.float64)
    return float(torch.trapezoid(f, x)), float(torch.trapezoid((1 - f).abs(), x))


def ranking(nodes: Nodes, effects: Mapping[str, Float[Tensor, "width"]]) -> dict[str, Int[Tensor, "width"]]:
    """Place of every node: those of `nodes` first, each part by falling |effect|, ties in the order of the run."""
    inside = torch.cat([nodes[location] for location in effects])
    size = torch.cat([effect.abs() for effect in effects.values()]).double()
    by_size = torch.argsort(size, descending=True, stable=True)
    order = by_size[torch.argsort(inside[by_size].long(), descending=True, stable=True)]
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order))
    return dict(zip(effects, places.split([len(effect) for effect in effects.values()]), strict=True))


def edges_by_rank(model: Runnable, rank: Mapping[str, Int[Tensor, "width"]]) -> Int[Tensor, "counts"]:
    """Number of edges among the first n nodes, for n from 0 to all of them.

    An edge (a non-zero weight) is there as soon as the later of its two nodes is.
    """
    born = torch.zeros(sum(len(places) for places in rank.values()) + 1, dtype=torch.long)
    for (source, target), weight in model.matrices().items():
        rows, columns = weight.cpu().nonzero(as_tuple=True)
        later = torch.maximum(rank[target][rows], rank[source][columns])
        born += torch.bincount(later + 1, minlength=len(born))
    return born.cumsum(0)

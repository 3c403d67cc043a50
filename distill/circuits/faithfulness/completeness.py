"""Completeness: does taking a part out of the circuit do what taking it out of the model does? (IOI paper, section 4)

Where the model still manages without K and the circuit does not, the model has a second way that the circuit misses.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from distill.circuits.circuit import Circuit
from distill.circuits.faithfulness.check import Check, verdict_of
from distill.circuits.faithfulness.limits import Limits
from distill.circuits.faithfulness.matched import random_circuits
from distill.circuits.faithfulness.necessity import complement
from distill.circuits.faithfulness.runs import Runs
from distill.circuits.faithfulness.statistics import spread_of
from distill.circuits.masks import Nodes
from distill.circuits.tasks import TaskBatch
from distill.model.run import Runnable

TRIES = 6
"""Candidates for each node that the worst subset grows by."""
NOTHING = 1e-9
"""Mean logit differences that are no further apart are the same."""
ROUNDING = 1e-5
"""A share of the model's logit difference below which a difference is none: a part of a circuit runs as a module of
its own, which adds the same single-precision numbers up in another order than the model does."""


@torch.no_grad()
def completeness(
    model: Runnable,
    circuit: Circuit,
    batch: TaskBatch,
    *,
    seed: int = 0,
    limits: Limits | None = None,
    runs: Runs | None = None,
) -> Check:
    """The mean over subsets K of the circuit of how differently circuit and model take the loss of K.

        value = mean over K of |F(C without K) - F(M without K)| / |F(M) - F(nothing)|,  F = mean logit difference

    where less than 1e-5 is rounding and counts as 0: a ratio of means over prompts for each K, then the mean over K:
    `subsets` random halves of the circuit, and the circuit's nodes at each location. Controls are random circuits with
    random halves of their own. `worst` in the details is a subset grown greedily, for reading: it is never judged, as
    circuits found by hand fail it too. Flagged where the value exceeds `incomplete`, and where F(M) equals F(nothing),
    so that there is nothing to complete. CircuitMismatchError for a circuit of another model.
    """
    limits, runs = limits or Limits(), runs or Runs(model, circuit)
    generator = torch.Generator().manual_seed(seed)
    scale = float((runs.difference(batch, runs.full(batch)) - runs.difference(batch, runs.empty(batch))).mean().abs())
    halves = [_half(circuit.nodes, generator) for _ in range(limits.subsets)]
    random_part = _incomplete(runs, batch, circuit.nodes, halves, scale)
    by_location = _incomplete(runs, batch, circuit.nodes, locations_of(circuit.nodes), scale)
    drawn = random_circuits(circuit, max(1, limits.random_circuits // 2), limits, generator)
    control = tuple(
        float(_incomplete(runs, batch, nodes, [_half(nodes, generator) for _ in range(4)], scale).mean())
        for nodes in drawn
    )
    every = torch.cat([random_part, by_location])
    value = float(every.mean())
    seen = f"without a part of it circuit and model differ by {value:.2g} of the model's logit difference"
    complaints = []
    if scale <= NOTHING:
        complaints.append("the model's logit difference is the same without any node: there is nothing to complete")
    elif value > limits.incomplete:
        complaints.append(f"{seen}: the model has other ways that it misses")
    verdict, reason = verdict_of(complaints, seen)
    return Check(
        name="completeness",
        value=value,
        control=control,
        threshold=limits.incomplete,
        verdict=verdict,
        reason=reason,
        n=len(batch),
        seed=seed,
        details={
            **spread_of("random", random_part),
            **spread_of("location", by_location),
            "worst": _grown(runs, batch, scale, limits.worst_steps, generator),
        },
    )


def locations_of(nodes: Nodes) -> list[Nodes]:
    """The part of a node set at each location that it has nodes at; [all of it] where it is empty."""
    none = {location: torch.zeros_like(mask) for location, mask in nodes.items()}
    return [{**none, location: mask} for location, mask in nodes.items() if bool(mask.any())] or [none]


def _half(nodes: Nodes, generator: torch.Generator) -> Nodes:
    return {location: mask & (torch.rand(len(mask), generator=generator) < 0.5) for location, mask in nodes.items()}


def _incomplete(runs: Runs, batch: TaskBatch, nodes: Nodes, parts: Sequence[Nodes], scale: float) -> Tensor:
    """|F(C without K) - F(M without K)| / scale for each part K, (parts,) float64; 0 where the scale is 0."""
    if scale <= NOTHING:
        return torch.zeros(len(parts), dtype=torch.float64)
    rests = [{location: mask & ~part[location] for location, mask in nodes.items()} for part in parts]
    if runs.holds(nodes):
        circuit = torch.stack([runs.of(batch, rest).mean() for rest in rests])
    else:
        circuit = runs.each(batch, rests).mean(1)
    model = runs.each(batch, [complement(part) for part in parts]).mean(1)
    shares = (circuit - model).abs() / scale
    return torch.where(shares < ROUNDING, 0.0, shares)


def _grown(runs: Runs, batch: TaskBatch, scale: float, steps: int, generator: torch.Generator) -> float:
    """The largest incompleteness of a subset that grows node by node, each the worst of a few drawn at random."""
    places = [(location, int(c)) for location, mask in runs.circuit.nodes.items() for c in mask.nonzero()[:, 0]]
    part = {location: torch.zeros_like(mask) for location, mask in runs.circuit.nodes.items()}
    worst = 0.0
    for _ in range(min(steps, len(places))):
        picks = torch.randperm(len(places), generator=generator)[:TRIES].tolist()
        trials = [_with(part, *places[pick]) for pick in picks]
        found, pick, part = max(
            zip(_incomplete(runs, batch, runs.circuit.nodes, trials, scale).tolist(), picks, trials, strict=True),
            key=lambda entry: entry[0],
        )
        places.pop(pick)
        worst = max(worst, found)
    return worst


def _with(nodes: Nodes, location: str, channel: int) -> Nodes:
    mask = nodes[location].clone()
    mask[channel] = True
    return {**nodes, location: mask}

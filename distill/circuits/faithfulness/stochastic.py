"""Stochastic restoration: do the ablated nodes matter once only some of them are ablated?

With everything else ablated, harm done by one ablated node may be undone by that done by another, and pruning picks
just those sets where it is. Restoring a random part of them breaks such bargains; a circuit that the model uses is left
at work, as the restored nodes only bring the model back.
"""

import math

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.functional import softplus

from distill.circuits.circuit import Circuit
from distill.circuits.faithfulness.check import Check, said, verdict_of
from distill.circuits.faithfulness.limits import Limits
from distill.circuits.faithfulness.runs import Runs
from distill.circuits.tasks import TaskBatch
from distill.model.run import Runnable


@torch.no_grad()
def stochastic(
    model: Runnable,
    circuit: Circuit,
    batch: TaskBatch,
    *,
    seed: int = 0,
    limits: Limits | None = None,
    runs: Runs | None = None,
) -> Check:
    """The largest mean task loss, in nats per prompt, over shares p of restored nodes.

        L(p) = mean over draws of L(C_r),  r_i ~ Bernoulli(p) for each node (and pruned edge) outside C, the same for
               all prompts of a draw: x_i = a_i + r_i (x_i - a_i);  value = max over p of L(p)

    L(0) is the circuit and L(1) the model, on all of `batch`. Between them one run holds several draws (and one of
    edges), each for `draw_pairs` or more of the pairs; there are at least `draws` for each p. Details: mean and worst
    draw for each p. Flagged where the value exceeds `stochastic_ratio` times max(L(0), L(1), `stochastic_floor`).
    CircuitMismatchError for a circuit of another model.
    """
    limits, runs = limits or Limits(), runs or Runs(model, circuit)
    generator = torch.Generator().manual_seed(seed)
    losses: dict[float, list[float]] = {}
    pairs = len(batch) // 2
    draws = max(1, min(limits.draws, pairs // limits.draw_pairs))
    groups = (torch.arange(pairs) % draws).repeat(2)
    for share in sorted(limits.shares):
        if 0 < share < 1:
            parts = [_losses(runs, batch, share, groups, generator) for _ in range(math.ceil(limits.draws / draws))]
            losses[share] = [loss for part in parts for loss in part]
        else:  # one outcome only
            losses[share] = _losses(runs, batch, share, torch.zeros_like(groups), generator)
    means = {share: sum(values) / len(values) for share, values in losses.items()}
    worst = max(means, key=lambda share: means[share])
    bound = limits.stochastic_ratio * max(means[0.0], means[1.0], limits.stochastic_floor)
    ends = f"the circuit alone has {said(means[0.0])}, the model {said(means[1.0])}"
    complaints = []
    if means[worst] > bound:
        complaints.append(
            f"with {worst:.0%} of the other nodes restored at random the loss is {said(means[worst])}, though {ends}: "
            "parts of what is ablated cancel out"
        )
    verdict, reason = verdict_of(complaints, f"loss at most {said(means[worst])} with others restored; {ends}")
    details = {f"mean_{share:g}": mean for share, mean in means.items()}
    details |= {f"max_{share:g}": max(values) for share, values in losses.items()}
    return Check(
        name="stochastic",
        value=means[worst],
        threshold=bound,
        verdict=verdict,
        reason=reason,
        n=len(batch),
        seed=seed,
        details=details,
    )


def _losses(
    runs: Runs, batch: TaskBatch, share: float, groups: Int[Tensor, "rows"], generator: torch.Generator
) -> list[float]:
    """The task loss of each group of rows under a draw of its own."""

    def draw(size: int) -> Tensor:
        return torch.rand(size, generator=generator) < share

    losses = softplus(-runs.difference(batch, runs.logits(batch, runs.restored(draw, groups))))
    return [float(losses[groups == group].mean()) for group in range(int(groups.max()) + 1)]

"""Adversarial restoration: the worst that bringing pruned nodes back in part can do, fitted and scored apart.

Circuits that people found by hand fail this too, so a circuit is read against random ones and not against a number.
"""

import torch
from torch import Tensor

from distill.circuits.answers import answer_difference, frozen, two_way_loss
from distill.circuits.circuit import Circuit
from distill.circuits.faithfulness.check import Check, said, skipped, verdict_of
from distill.circuits.faithfulness.limits import Limits
from distill.circuits.faithfulness.matched import random_circuits
from distill.circuits.faithfulness.runs import Runs
from distill.circuits.faithfulness.statistics import percentile, rank_p
from distill.circuits.masks import Nodes
from distill.circuits.tasks import TaskBatch
from distill.model.run import Runnable


def adversarial(
    model: Runnable,
    circuit: Circuit,
    fit: TaskBatch,
    batch: TaskBatch,
    *,
    seed: int = 0,
    limits: Limits | None = None,
    runs: Runs | None = None,
) -> Check:
    """The task loss in nats per prompt on `batch` under the restoration r that is worst for `fit`.

        r* = argmax over r in [0, 1]^n of L_fit(C_r),  x_i = a_i + r_i (x_i - a_i) for the n nodes outside C
        by projected sign-gradient ascent: r <- clip(r + step * sign(dL/dr), 0, 1), from r uniform at random

    r is one number per node, the same for all prompts; edges that were pruned stay out. Controls are random circuits
    (`matched.random_sets`), attacked alike. Flagged where the loss is not below the `better` percentile of theirs;
    skipped where no node was pruned.
    CircuitMismatchError for a circuit of another model.
    """
    limits, runs = limits or Limits(), runs or Runs(model, circuit)
    if all(bool(mask.all()) for mask in circuit.nodes.values()):
        return skipped("adversarial", "no node was pruned, so none can be restored", n=len(batch))
    generator = torch.Generator().manual_seed(seed)
    drawn = random_circuits(circuit, max(1, limits.random_circuits // 2), limits, generator)
    attacked = [_attack(runs, nodes, fit, batch, limits, generator) for nodes in (circuit.nodes, *drawn)]
    value, control = attacked[0], tuple(attacked[1:])
    least = percentile(control, limits.better)
    seen = f"under the worst partial restoration the loss is {said(value)}"
    rest = f"random circuits' {limits.better:.0f}th percentile {said(least)}"
    complaints = [f"{seen}, no better than {rest}"] if value >= least else []
    verdict, reason = verdict_of(complaints, f"{seen}, {rest}")
    return Check(
        name="adversarial",
        value=value,
        control=control,
        threshold=least,
        verdict=verdict,
        reason=reason,
        n=len(batch),
        seed=seed,
        p=rank_p(value, control, high=False),
        details={"loss_circuit": float(two_way_loss(runs.difference(batch, runs.ours(batch))))},
    )


def _attack(
    runs: Runs, nodes: Nodes, fit: TaskBatch, batch: TaskBatch, limits: Limits, generator: torch.Generator
) -> float:
    masks = ascend(runs, nodes, fit, steps=limits.ascent_steps, step=limits.ascent_step, generator=generator)
    tap = runs.parted(masks, pruned=runs.holds(nodes))
    return float(two_way_loss(runs.difference(batch, runs.logits(batch, tap))))


def ascend(
    runs: Runs, nodes: Nodes, fit: TaskBatch, *, steps: int, step: float, generator: torch.Generator
) -> dict[str, Tensor]:
    """Masks that are 1 on `nodes` and r* elsewhere, (width,) by location; the best seen on `fit`.

    Gradients are taken with all nodes competing for AbsTopK slots: one that is off would not know what it is worth.
    """
    masks = {location: torch.rand(len(mask), generator=generator).masked_fill(mask, 1.0).to(runs.device)
             for location, mask in nodes.items()}  # fmt: skip
    best, worst = masks, -torch.inf
    with torch.enable_grad(), frozen(runs.model):
        for _ in range(steps + 1):
            leaves = {location: mask.requires_grad_() for location, mask in masks.items()}
            tap = runs.parted(leaves, pruned=runs.holds(nodes), competition=True)
            loss = two_way_loss(answer_difference(runs.model, fit, tap))
            if float(loss.detach()) > worst:
                best, worst = {location: mask.detach() for location, mask in leaves.items()}, float(loss.detach())
            gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
            masks = {
                location: mask.detach() if gradient is None else _step(mask, gradient, nodes[location], step)
                for (location, mask), gradient in zip(leaves.items(), gradients, strict=True)
            }
    return best


def _step(mask: Tensor, gradient: Tensor, kept: Tensor, step: float) -> Tensor:
    return (mask.detach() + step * gradient.sign()).clamp(0, 1).masked_fill(kept.to(mask.device), 1.0)

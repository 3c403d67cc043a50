"""Ablation matrix: does the circuit still work when the rest is set to something else, or the norms are held?

A pruned residual stream is shorter, and the norms then make small writes larger; means leave a constant background
that no prompt of its own would give. A circuit that only works on such crutches is an artefact of them.
"""

import torch
from jaxtyping import Int
from torch import Tensor

from distill.circuits.ablation import resampled, task_means, zeros
from distill.circuits.answers import frozen_norms, two_way_loss
from distill.circuits.circuit import Circuit
from distill.circuits.faithfulness.check import Check, said, verdict_of
from distill.circuits.faithfulness.limits import Limits
from distill.circuits.faithfulness.matched import random_circuits
from distill.circuits.faithfulness.runs import Runs
from distill.circuits.faithfulness.statistics import percentile, rank_p, refit
from distill.circuits.tasks import TaskBatch
from distill.model.run import Runnable
from distill.model.sites import chain

JUDGED = ("resample_free", "mean_frozen")
"""The cells that are judged: another value, and other norms, each alone."""


@torch.no_grad()
def ablations(
    model: Runnable,
    circuit: Circuit,
    batch: TaskBatch,
    corpus: Int[Tensor, "n T1"],
    *,
    seed: int = 0,
    limits: Limits | None = None,
    runs: Runs | None = None,
) -> Check:
    """The circuit's task loss under each ablation value and with norms free and frozen; the worst judged cell.

        L(C; a, s) = mean log(1 + exp(-d)),  a in {corpus mean, task mean, resample, zero},
                     s in {free, 1/sigma of every norm as in the full model on the same prompt}

    in nats per prompt, as `{value}_{norms}` in the details. Resample: each position of each prompt gets one token of
    `corpus`, whose activations all ablated nodes take. The value is the worse of resample_free and mean_frozen.

    Controls are random circuits (`matched.random_sets`) in that cell, each at its best scale >= 0, as some would do
    badly merely by being too sure; they are read against the circuit at its best scale (`refitted`). Flagged where the
    value exceeds `ablation_ratio` times the target and `refitted` is no better than random circuits, not below their
    `better` percentile. CircuitMismatchError for another model's circuit.
    """
    limits, runs = limits or Limits(), runs or Runs(model, circuit)
    values = {
        "mean": runs.means,
        "task": task_means(model, batch, runs.means),
        "resample": resampled(model, corpus[:, :-1], batch, runs.means, seed=seed),
        "zero": zeros(runs.means),
    }
    held = frozen_norms(model, batch)

    def difference(value: str, norms: str) -> Tensor:
        tap = runs.tap(means=values[value])
        return runs.difference(batch, runs.logits(batch, chain(tap, held) if norms == "frozen" else tap))

    cells = {f"{value}_{norms}": two_way_loss(difference(value, norms)).item()
             for value in values for norms in ("free", "frozen")}  # fmt: skip
    worst = max(JUDGED, key=lambda cell: cells[cell])
    generator = torch.Generator().manual_seed(seed)
    drawn = random_circuits(circuit, limits.random_circuits, limits, generator)
    value, norms = worst.split("_")
    theirs = runs.each(batch, drawn, means=values[value], norms=held if norms == "frozen" else None)
    refitted, *control = refit(torch.cat([difference(value, norms)[None], theirs]))[0].tolist()
    bound = limits.ablation_ratio * circuit.target
    least = percentile(control, limits.better)
    what = f"loss {said(cells[worst])} with {_words(worst)}"
    rest = f"random circuits' {limits.better:.0f}th percentile {said(least)}"
    above = f"{what}, above {said(bound)}; at its best scale {said(refitted)}"
    complaints = []
    if cells[worst] > bound and refitted >= least:
        complaints.append(f"{above}, no better than {rest}")
    praise = f"{above}, better than {rest}"
    if cells[worst] <= bound:
        praise = f"{what}, the worse of resampling and frozen norms, within {said(bound)}"
    verdict, reason = verdict_of(complaints, praise)
    return Check(
        name="ablations",
        value=cells[worst],
        control=tuple(control),
        threshold=bound,
        verdict=verdict,
        reason=reason,
        n=len(batch),
        seed=seed,
        p=rank_p(refitted, control, high=False),
        details={**cells, "refitted": refitted, "random_better": least},
    )


def _words(cell: str) -> str:
    return "resampled nodes" if cell == "resample_free" else "norms frozen to the model's"

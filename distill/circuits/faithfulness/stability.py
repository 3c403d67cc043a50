"""Stability: do other seeds find the same circuit, and does it work on each other's prompts?

Two circuits that share little may both be true, where a model does a thing in several ways; so low overlap alone is no
failure.
"""

from collections.abc import Sequence
from itertools import combinations
from statistics import median

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from distill.circuits.answers import two_way_loss
from distill.circuits.circuit import Circuit
from distill.circuits.faithfulness.check import Check, said, skipped, verdict_of
from distill.circuits.faithfulness.controls import config_of, edges_of
from distill.circuits.faithfulness.limits import Limits
from distill.circuits.faithfulness.runs import Runs
from distill.circuits.prune import prune
from distill.circuits.selection import TargetError
from distill.circuits.tasks import Task, TaskBatch
from distill.model.run import Runnable


@torch.no_grad()
def stability(
    model: Runnable,
    circuit: Circuit,
    others: Sequence[Circuit],
    batches: Sequence[TaskBatch],
    *,
    limits: Limits | None = None,
) -> Check:
    """The mean Jaccard index of nodes over pairs of seeds.

        value = mean over pairs of |nodes in both| / |nodes in either|

    `others` are circuits pruned alike with other seeds, `batches` the prompts of each seed, those of `circuit` first.
    Details: the same for edges, sizes, and transfer, the task loss of each circuit on each other seed's prompts in nats
    per prompt. Flagged only where the circuits are different ones (value below `overlap`) and their median transfer
    misses the target by `transfer_ratio`. Skipped without other circuits. CircuitMismatchError for another model's.
    """
    limits = limits or Limits()
    circuits = [circuit, *others]
    if not others or len(batches) != len(circuits):
        return skipped("stability", f"{len(others)} other circuits and {len(batches)} batches of prompts")
    nodes = [one.jaccard(other) for one, other in combinations(circuits, 2)]
    edges = [one.edge_jaccard(other, model) for one, other in combinations(circuits, 2)]
    transfer = [
        float(two_way_loss(runs.difference(batch, runs.ours(batch))))
        for place, runs in enumerate(Runs(model, one) for one in circuits)
        for at, batch in enumerate(batches)
        if at != place
    ]
    value = sum(nodes) / len(nodes)
    sizes = [one.n_nodes for one in circuits]
    seen = f"{len(circuits)} seeds: {min(sizes)} to {max(sizes)} nodes, {value:.0%} shared by two on average"
    moved = f"loss on each other's prompts {said(median(transfer))} (worst {said(max(transfer))})"
    complaints = []
    if value < limits.overlap and median(transfer) > limits.transfer_ratio * circuit.target:
        complaints.append(f"{seen}, and {moved}: each fits its own prompts")
    verdict, reason = verdict_of(complaints, f"{seen}; {moved}")
    return Check(
        name="stability",
        value=value,
        threshold=limits.overlap,
        verdict=verdict,
        reason=reason,
        n=sum(len(batch) for batch in batches),
        seed=config_of(circuit).seed,
        details={
            "jaccard_nodes_min": min(nodes),
            "jaccard_edges_mean": sum(edges) / len(edges),
            "jaccard_edges_min": min(edges),
            **_range("nodes", sizes),
            **_range("edges", [edges_of(model, one) for one in circuits]),
            "transfer_median": median(transfer),
            "transfer_max": max(transfer),
        },
    )


def _range(name: str, sizes: Sequence[int]) -> dict[str, float]:
    found = {"min": min(sizes), "median": median(sizes), "max": max(sizes)}
    return {f"{name}_{statistic}": float(value) for statistic, value in found.items()}


def reseeded(
    model: Runnable,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    circuit: Circuit,
    corpus: Int[Tensor, "n T1"],
    *,
    seeds: int,
) -> list[Circuit]:
    """Circuits pruned as `circuit` was, with the `seeds` - 1 seeds after its own; those that miss the loss are out.

    `corpus` is held-out text, for circuits whose ablated nodes are resampled.
    """
    first = config_of(circuit).seed
    found = []
    for seed in range(first + 1, first + seeds):
        try:
            config = config_of(circuit, seed)
            name = circuit.model_name
            found.append(prune(model, task, tokenizer, circuit.means, config, model_name=name, corpus=corpus[:, :-1]))
        except TargetError:
            continue
    return found

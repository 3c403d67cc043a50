"""Necessity: is the task lost when just the circuit is taken out of the model, and little else?

A circuit of busy nodes does damage whatever they do, so the damage is read against random node sets of the same size
at every location and of the same activity (`matched.random_sets`), and beside that done to other tasks and to text.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy, softplus

from distill.circuits.ablation import Means
from distill.circuits.circuit import Circuit
from distill.circuits.faithfulness.check import Check, Verdict, said
from distill.circuits.faithfulness.limits import Limits
from distill.circuits.faithfulness.matched import random_circuits
from distill.circuits.faithfulness.runs import Runs
from distill.circuits.faithfulness.statistics import by_pair, larger_p, percentile, rank_p, refit
from distill.circuits.masks import MaskTap, Nodes
from distill.circuits.tasks import TaskBatch
from distill.model.run import Runnable
from distill.model.sites import Tap

NOTHING = 1e-3
"""A rise of the loss below this, in nats, is none."""


@torch.no_grad()
def necessity(
    model: Runnable,
    circuit: Circuit,
    batch: TaskBatch,
    *,
    sets: int | None = None,
    others: Mapping[str, TaskBatch] | None = None,
    corpus: Int[Tensor, "n T1"] | None = None,
    seed: int = 0,
    limits: Limits | None = None,
    runs: Runs | None = None,
) -> Check:
    """The task loss L(M without C) in nats per prompt, the circuit's nodes ablated and everything else running.

        L(M without C) = min over s >= 0 of mean log(1 + exp(-s d)),  d = right minus wrong logit of M without C

    The refitted scale s keeps a mere loss of contrast from counting as damage; the loss is in [0, ln 2]. Controls are
    `sets` random node sets (by default `limits.sets`) drawn by `random_sets`, scored alike. `batch` holds prompts that
    pruning never saw.

    Specificity: the rise of the loss, refitted too, on `others` (batches of other tasks by name; details
    `damage_other_*`), and in nats per token on `corpus` (windows with one token more than targets; `damage_corpus`);
    `p_specific` is a permutation test of this task's pairs against all others'.

    Flagged where fewer than `percentile` percent of the controls stay below the loss, and where the damage is no larger
    than the median over other tasks; an artefact where the loss is below the controls' median, or no higher than with
    the circuit in place. Differences under 1e-3 nats are none. CircuitMismatchError for a circuit of another model;
    ValueError for fewer than one set.
    """
    limits, runs = limits or Limits(), runs or Runs(model, circuit)
    sets = limits.sets if sets is None else sets
    if sets < 1:
        raise ValueError(f"sets: got {sets}; allowed are 1 and more")
    drawn = random_circuits(circuit, sets, limits, torch.Generator().manual_seed(seed))
    losses, scales = refit(runs.each(batch, [complement(nodes) for nodes in (circuit.nodes, *drawn)]))
    value, control = float(losses[0]), tuple(losses[1:].tolist())
    damage = {"task": _damage(runs, batch)}
    damage |= {f"other_{name}": _damage(runs, other) for name, other in (others or {}).items()}
    details = {
        "scale": float(scales[0]),
        "loss_full": float(refit(runs.difference(batch, runs.full(batch))[None])[0]),
        "share_of_random_below": sum(loss < value - NOTHING for loss in control) / sets,
        **{f"damage_{name}": float(each.mean()) for name, each in damage.items()},
    }
    if others:
        rest = torch.cat([by_pair(each) for name, each in damage.items() if name != "task"])
        details["p_specific"] = larger_p(by_pair(damage["task"]), rest, seed=seed)
    if corpus is not None:
        before, after = (corpus_loss(model, corpus, tap) for tap in (None, without(circuit.nodes, runs.means)))
        details["damage_corpus"] = after - before
    verdict, reason = _judge(value, control, details, limits)
    return Check(
        name="necessity",
        value=value,
        control=control,
        threshold=percentile(control, limits.percentile),
        verdict=verdict,
        reason=reason,
        n=len(batch),
        seed=seed,
        p=rank_p(value - NOTHING, control, high=True),
        details=details,
    )


def _judge(value: float, control: tuple[float, ...], details: dict[str, float], limits: Limits) -> tuple[Verdict, str]:
    others = [each for name, each in details.items() if name.startswith("damage_other_")]
    threshold, median = percentile(control, limits.percentile), percentile(control, 50)
    seen = f"without the circuit the loss is {said(value)}"
    least = f"the random sets' {limits.percentile:.0f}th percentile {said(threshold)}"
    if value <= details["loss_full"] + NOTHING:
        return "artefact", f"{seen}, no higher than with it ({said(details['loss_full'])}): nothing is lost"
    if 100 * details["share_of_random_below"] < limits.percentile:
        if value < median - NOTHING:
            return "artefact", f"{seen}, below what random sets cost ({said(median)}): the model does not use it"
        return "flag", f"{seen}, not above {least}: random nodes are needed as much"
    if others and details["damage_task"] <= percentile(others, 50):
        rest = f"{said(percentile(others, 50))}"
        return "flag", f"taking it out costs its own task {said(details['damage_task'])} nats, other tasks {rest}"
    alone = "" if others else "; no other task was there to compare with"
    return "pass", f"{seen}, {least}{alone}"


def without(nodes: Mapping[str, Bool[Tensor, "width"]], means: Means) -> Tap:
    """A tap that ablates only these nodes."""
    return MaskTap(complement(nodes), means)


def complement(nodes: Mapping[str, Bool[Tensor, "width"]]) -> Nodes:
    """All other nodes."""
    return {location: ~mask for location, mask in nodes.items()}


def _damage(runs: Runs, batch: TaskBatch) -> Float[Tensor, "n"]:
    """Rise of the loss on each prompt when the circuit is taken out, in nats, at the best scale before and after."""
    full = runs.difference(batch, runs.full(batch))
    after = runs.difference(batch, runs.logits(batch, without(runs.circuit.nodes, runs.means)))
    both = torch.stack([full, after])
    before, rest = softplus(-refit(both)[1][:, None] * both)
    return rest - before


@torch.no_grad()
def corpus_loss(model: Runnable, windows: Int[Tensor, "n T1"], tap: Tap | None) -> float:
    """Next-token loss on windows of text, in nats per token; each window has one token more than it has targets."""
    tokens = windows.to(next(model.parameters()).device).long()
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    logits = model.readout(model.run(inputs, tap=tap, stop="final_resid"), inputs)
    return float(cross_entropy(logits.float().flatten(0, 1), targets.flatten()))

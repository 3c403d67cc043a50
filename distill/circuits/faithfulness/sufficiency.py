"""Sufficiency: does the circuit alone do the task, and does it answer as the model does?"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import log_softmax, softplus

from distill.circuits.ablation import Means
from distill.circuits.answers import answer_difference, two_way_loss
from distill.circuits.circuit import Circuit
from distill.circuits.faithfulness.check import Check, said, verdict_of
from distill.circuits.faithfulness.limits import Limits
from distill.circuits.faithfulness.runs import Runs
from distill.circuits.faithfulness.statistics import by_pair, mean_interval, spread_of
from distill.circuits.masks import MaskTap, all_nodes
from distill.circuits.objectives import answer_kl
from distill.circuits.tasks import TaskBatch
from distill.model.run import Runnable


@torch.no_grad()
def sufficiency(
    model: Runnable,
    circuit: Circuit,
    batch: TaskBatch,
    *,
    seed: int = 0,
    limits: Limits | None = None,
    runs: Runs | None = None,
) -> Check:
    """The circuit's task loss L(C) in nats per prompt, and how far its answers are from the model's.

        L(C)       = mean log(1 + exp(-d_C)),  d = logit of the right minus logit of the wrong answer
        KL(M || C) = sum_a p_M(a) log(p_M(a) / p_C(a))

    with a over the two answers (`kl_answers_*`, and `kl_answers_calibrated_*`) and over the vocabulary
    (`kl_vocabulary_*`), per prompt; agreement is the share of prompts with the same arg max; `loss_low` and `loss_high`
    are the ends of a 95% bootstrap interval over pairs, drawn with `seed`. `batch` holds prompts that pruning never
    saw. Flagged where the target is missed or met only after calibration, where it is met though the model itself
    misses it, and where the 95th percentile of the KL on the answers exceeds `tail_ratio` times its median (and
    `tail_floor` nats).
    CircuitMismatchError for a circuit of another model.
    """
    limits, runs = limits or Limits(), runs or Runs(model, circuit)
    logits, ours = runs.full(batch), runs.ours(batch)
    full, difference = runs.difference(batch, logits), runs.difference(batch, ours)
    calibrated = circuit.calibration(difference, batch.orientation.double().cpu())
    answers = answer_kl(full, difference)
    low, high = mean_interval(by_pair(softplus(-difference)), seed=seed)
    details = {
        "loss_full": float(two_way_loss(full)),
        "loss_calibrated": float(two_way_loss(calibrated)),
        "loss_low": low,
        "loss_high": high,
        **spread_of("loss", softplus(-difference)),
        "agreement_answers": float(((full > 0) == (difference > 0)).double().mean()),
        "agreement_vocabulary": float((logits.argmax(-1) == ours.argmax(-1)).double().mean()),
        **spread_of("kl_answers", answers),
        **spread_of("kl_answers_calibrated", answer_kl(full, calibrated)),
        **spread_of("kl_vocabulary", kl(logits, ours)),
    }
    loss = float(two_way_loss(difference))
    complaints = _complaints(circuit.target, loss, details, limits)
    praise = f"loss {said(loss)} meets the target {said(circuit.target)}; KL on the answers {_tail(details)}"
    verdict, reason = verdict_of(complaints, praise)
    return Check(
        name="sufficiency",
        value=loss,
        threshold=circuit.target,
        verdict=verdict,
        reason=reason,
        n=len(batch),
        seed=seed,
        details=details,
    )


def _complaints(target: float, loss: float, details: dict[str, float], limits: Limits) -> list[str]:
    after, full = details["loss_calibrated"], details["loss_full"]
    tail, median = details["kl_answers_p95"], details["kl_answers_median"]
    found = []
    if loss > target and after > target:
        found.append(f"loss {said(loss)} misses the target {said(target)}, calibrated {said(after)} too")
    elif loss > target:
        found.append(f"loss {said(loss)} meets the target {said(target)} only after calibration ({said(after)})")
    elif full > target:
        found.append(
            f"it does better ({said(loss)}) than the model ({said(full)}), which misses the target {said(target)}"
        )
    if tail > max(limits.tail_ratio * median, limits.tail_floor):
        found.append(f"on some prompts it answers quite unlike the model: KL {_tail(details)}")
    return found


def _tail(details: dict[str, float]) -> str:
    return f"at p95 {said(details['kl_answers_p95'])}, median {said(details['kl_answers_median'])}"


def kl(model: Float[Tensor, "n A"], circuit: Float[Tensor, "n A"]) -> Float[Tensor, "n"]:
    """KL(model || circuit) between the softmax distributions of two sets of logits, in nats per prompt, at least 0."""
    p, q = log_softmax(model.double(), -1), log_softmax(circuit.double(), -1)
    return (p.exp() * (p - q)).sum(-1).clamp_min(0)


@torch.no_grad()
def loss_empty(model: Runnable, means: Means, batch: TaskBatch) -> float:
    """Task loss with every node ablated, in nats per prompt: what embeddings and bigram table do alone."""
    tap = MaskTap(all_nodes(model.widths, keep=False), means)
    return float(two_way_loss(answer_difference(model, batch, tap)))

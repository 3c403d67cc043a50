"""Sufficiency: does the circuit alone do the task, and does it answer as the model does?"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import log_softmax

from distill.circuits.ablation import Means
from distill.circuits.answers import answer_difference, answer_logits, two_way_loss
from distill.circuits.circuit import Circuit
from distill.circuits.faithfulness import Check
from distill.circuits.masks import MaskTap, all_nodes
from distill.circuits.tasks import TaskBatch, logit_difference
from distill.model.run import Runnable

TAIL_RATIO = 10.0
TAIL_FLOOR = 1e-3
"""A 95th percentile of KL below this, in nats, is rounding and no tail."""


@torch.no_grad()
def sufficiency(
    model: Runnable,
    circuit: Circuit,
    batch: TaskBatch,
    *,
    tail_ratio: float = TAIL_RATIO,
    tail_floor: float = TAIL_FLOOR,
) -> Check:
    """The circuit's task loss L(C) in nats per prompt, and how far its answers are from the model's.

        L(C)       = mean log(1 + exp(-d_C)),  d = logit of the right minus logit of the wrong answer
        KL(M || C) = sum_a p_M(a) log(p_M(a) / p_C(a))

    with a over the two answers (`kl_answers_*`) and over the vocabulary (`kl_vocabulary_*`), per prompt; agreement is
    the share of prompts with the same arg max. `batch` holds prompts that pruning never saw. Flagged where the target
    is met only after calibration or not at all, and where the 95th percentile of the KL on the answers exceeds
    `tail_ratio` times its median (and `tail_floor` nats). CircuitMismatchError for a circuit of another model.
    """
    tap = circuit.tap(model)
    logits, ours = answer_logits(model, batch).float(), answer_logits(model, batch, tap).float()
    batch = batch.to(logits.device)
    difference = logit_difference(ours, batch)
    calibrated = circuit.calibration(difference, batch.orientation)
    full = logit_difference(logits, batch)
    loss, after = float(two_way_loss(difference)), float(two_way_loss(calibrated))
    answers = kl(_pair(full), _pair(difference))
    details = {
        "loss_full": float(two_way_loss(full)),
        "loss_calibrated": after,
        "agreement_answers": float(((full > 0) == (difference > 0)).float().mean()),
        "agreement_vocabulary": float((logits.argmax(-1) == ours.argmax(-1)).float().mean()),
        **spread_of("kl_answers", answers),
        **spread_of("kl_answers_calibrated", kl(_pair(full), _pair(calibrated))),
        **spread_of("kl_vocabulary", kl(logits, ours)),
    }
    verdict, reason = _judge(circuit.target, loss, after, details, tail_ratio, tail_floor)
    return Check(
        name="sufficiency",
        value=loss,
        threshold=circuit.target,
        verdict=verdict,
        reason=reason,
        n=len(batch),
        details=details,
    )


def _judge(
    target: float, loss: float, after: float, details: dict[str, float], ratio: float, floor: float
) -> tuple[Literal["pass", "flag"], str]:
    tail, median = details["kl_answers_p95"], details["kl_answers_median"]
    if loss > target and after > target:
        return "flag", f"loss {loss:.3g} misses the target {target:.3g}, calibrated {after:.3g} too"
    if loss > target:
        return "flag", f"loss {loss:.3g} meets the target {target:.3g} only after calibration ({after:.3g})"
    if tail > max(ratio * median, floor):
        return "flag", f"on some prompts it answers quite unlike the model: KL at p95 {tail:.3g}, median {median:.3g}"
    return "pass", f"loss {loss:.3g} meets the target {target:.3g}; KL on the answers at p95 {tail:.3g}"


def kl(model: Float[Tensor, "n A"], circuit: Float[Tensor, "n A"]) -> Float[Tensor, "n"]:
    """KL(model || circuit) between the softmax distributions of two sets of logits, in nats per prompt, at least 0."""
    p, q = log_softmax(model.double(), -1), log_softmax(circuit.double(), -1)
    return (p.exp() * (p - q)).sum(-1).clamp_min(0)


def _pair(difference: Float[Tensor, "n"]) -> Float[Tensor, "n 2"]:
    return torch.stack([difference, torch.zeros_like(difference)], -1)


def spread_of(name: str, values: Float[Tensor, "n"]) -> dict[str, float]:
    """Mean, median, interquartile range, 95th and 99th percentile over prompts, as `{name}_mean` and so on."""
    shares = torch.tensor([0.25, 0.5, 0.75, 0.95, 0.99], dtype=torch.float64, device=values.device)
    low, median, high, p95, p99 = torch.quantile(values.double(), shares).tolist()
    found = {"mean": float(values.mean()), "median": median, "iqr": high - low, "p95": p95, "p99": p99}
    return {f"{name}_{statistic}": value for statistic, value in found.items()}


@torch.no_grad()
def loss_empty(model: Runnable, means: Means, batch: TaskBatch) -> float:
    """Task loss with every node ablated, in nats per prompt: what embeddings and bigram table do alone."""
    tap = MaskTap(all_nodes(model.widths, keep=False), means)
    return float(two_way_loss(answer_difference(model, batch, tap)))

"""What a task asks of a model: the logits of two answers at the last token of a prompt, and the loss on them.

The task loss is the two-way cross-entropy between the right and the wrong answer, mean over prompts; chance is
ln 2 = 0.693 nats. Both members of each pair count [G 2.2].

Calibration is two numbers [G A.5]: a scale >= 0 on the difference of the two logits, and a shift of the first class's
logit against the second's. The shift is tied to the *class* of the answer, never to right against wrong, which would
tell the answer away; there is none where the answer tokens vary from pair to pair.

On prompts that a circuit gets right throughout, the best scale is infinite, and on others that it then gets wrong the
loss explodes. So both numbers are fitted to smoothed targets: with n prompts the right answer is taken to be right with
probability (n + 1) / (n + 2), as Platt does, which bounds scale * difference near log(n + 1).
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import pad, softplus

from distill.circuits.ablation import FreezeNorms, NonFiniteError
from distill.circuits.tasks import TaskBatch, logit_difference
from distill.model.run import Runnable
from distill.model.sites import Tap, chain

CHANCE = math.log(2)
"""Task loss of a model that cannot tell the two answers apart, in nats."""
LBFGS_STEPS = 16


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """d -> scale * d + orientation * shift, for d the logit of the right answer minus that of the wrong one."""

    scale: float = 1.0
    shift: float = 0.0

    def __call__(self, difference: Float[Tensor, "n"], orientation: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
        return self.scale * difference + self.shift * orientation


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode with no gradients to its weights; both are put back at the end."""
    training = model.training
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.eval()
        model.requires_grad_(False)
        yield
    finally:
        for parameter, needed in before:
            parameter.requires_grad_(needed)
        model.train(training)


def take(batch: TaskBatch, pairs: Int[Tensor, "n"]) -> TaskBatch:
    """Some pairs of a batch, both members of each, without the padding that these do not need."""
    chosen = batch.select(torch.cat([pairs, pairs + len(batch) // 2]))
    length = int(chosen.last.max()) + 1
    return replace(chosen, tokens=chosen.tokens[:, :length], attention_mask=chosen.attention_mask[:, :length])


def joined(one: TaskBatch, other: TaskBatch) -> TaskBatch:
    """The pairs of two batches of one task as one batch, clean rows first."""
    length = max(one.tokens.shape[1], other.tokens.shape[1])

    def rows(name: str) -> Tensor:
        halves = [half for batch in (one, other) for half in (getattr(batch, name).chunk(2),)]
        parts = [half[0] for half in halves] + [half[1] for half in halves]
        if parts[0].dim() == 2:
            parts = [pad(part, (0, length - part.shape[1])) for part in parts]
        return torch.cat(parts)

    names = ("tokens", "attention_mask", "last", "answer", "other", "labels", "orientation")
    return replace(one, **{name: rows(name) for name in names}, dropped=one.dropped + other.dropped)


def answer_logits(model: Runnable, batch: TaskBatch, tap: Tap | None = None) -> Float[Tensor, "n V"]:
    """Logits over the vocabulary at the last token of each prompt.

    Only these positions are unembedded. Prompts are padded on the right and attention is causal, so the padding is
    out of reach of the last token and needs no mask.
    """
    device = next(model.parameters()).device
    tokens, last = batch.tokens.to(device), batch.last.to(device)
    rows = torch.arange(len(tokens), device=device)
    residual = model.run(tokens, tap=tap, stop="final_resid")[rows, last]
    return model.readout(residual, tokens[rows, last], tap=tap)


def answer_difference(model: Runnable, batch: TaskBatch, tap: Tap | None = None) -> Float[Tensor, "n"]:
    """Logit of the right answer minus that of the wrong one, per prompt, from one run of the model.

    NonFiniteError names the first place in the run where an activation is not finite.
    """
    logits = answer_logits(model, batch, tap)
    difference = logit_difference(logits, batch.to(logits.device))
    if not bool(difference.isfinite().all()):
        check_finite(model, batch, tap)
        raise NonFiniteError("logits: not finite on the task's prompts")
    return difference


def two_way_loss(difference: Float[Tensor, "n"]) -> Float[Tensor, ""]:
    """Two-way cross-entropy of right against wrong: mean of log(1 + exp(-difference)), in nats per prompt."""
    return softplus(-difference).mean()


@torch.no_grad()
def frozen_norms(model: Runnable, batch: TaskBatch) -> FreezeNorms:
    """A tap that keeps every norm at the scale it has when the whole model runs on these prompts."""
    scales: dict[str, Tensor] = {}

    class Keep:
        wants = FreezeNorms.wants

        def __call__(self, site: str, x: Tensor, /) -> Tensor:
            if site.endswith(".norm_scale"):
                scales[site] = x.detach()
            return x

    answer_logits(model, batch, Keep())
    return FreezeNorms(scales)


def calibrate(
    difference: Float[Tensor, "n"], orientation: Float[Tensor, "n"], *, shift: bool = True, smooth: bool = True
) -> Calibration:
    """Scale >= 0 and shift of least task loss on the prompts given, by 16 steps of L-BFGS [G A.5].

    `smooth` fits to smoothed targets (see the module's docstring) and leaves the logits as they are where this fit
    would do worse on the same prompts; without it the loss itself is minimised, and the scale may be huge. The loss is
    convex, so where the free optimum has a negative scale the bound is active: the scale is 0 and the shift is fitted
    alone. With `shift` off, or `orientation` 0, only the scale is fitted.
    """
    difference, orientation = difference.detach().double().cpu(), orientation.double().cpu()
    shift = shift and bool(orientation.any())
    doubt = 1 / (len(difference) + 2) if smooth else 0.0
    fitted = _fit(difference, orientation, doubt, scale=True, shift=shift)
    if fitted.scale < 0:
        alone = _fit(difference, orientation, doubt, scale=False, shift=True) if shift else fitted
        fitted = replace(alone, scale=0.0)
    if smooth and two_way_loss(difference) < two_way_loss(fitted(difference, orientation)):
        return Calibration()
    return fitted


def _fit(difference: Tensor, orientation: Tensor, doubt: float, *, scale: bool, shift: bool) -> Calibration:
    start = torch.tensor([1.0 if scale else 0.0, 0.0], dtype=torch.float64, requires_grad=True)
    used = torch.tensor([scale, shift], dtype=torch.float64)
    optimizer = torch.optim.LBFGS([start], max_iter=LBFGS_STEPS, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        free = start * used
        moved = free[0] * difference + free[1] * orientation
        # Cross-entropy against right with probability 1 - doubt, wrong with probability doubt.
        loss = (softplus(-moved) + doubt * moved).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    fitted = (start * used).detach()
    return Calibration(scale=float(fitted[0]), shift=float(fitted[1]))


@torch.no_grad()
def check_finite(model: Runnable, batch: TaskBatch, tap: Tap | None = None, *, rows: int | None = None) -> None:
    """NonFiniteError naming the first place in a run where an activation is infinite or not a number.

    Finite logits do not say as much: attention may turn what is not a number into 0. `rows` prompts are run at once,
    by default all of them.
    """
    found: list[str] = []

    def look(site: str, x: Tensor, /) -> Tensor:
        if not bool(x.isfinite().all()):
            found.append(site)
        return x

    for start in range(0, len(batch), rows or len(batch)):
        part = batch.select(slice(start, start + (rows or len(batch))))
        answer_logits(model, part, look if tap is None else chain(look, tap))
        if found:
            raise NonFiniteError(f"{found[0]}: activations are not finite on the task's prompts")

"""From scores to a node set: the fewest nodes, by rank, whose loss meets a target, and what can still be left out.

A `Judge` scores node sets on one fixed batch of validation prompts. Pruned channels do not compete for AbsTopK slots
here, and the batch stays the same throughout: fresh batches at each step would make the search accept by luck.
"""

import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import softplus

from distill.circuits.ablation import Means
from distill.circuits.answers import Calibration, answer_difference, calibrate, take, two_way_loss
from distill.circuits.masks import MaskTap, NodeMasks, Nodes
from distill.circuits.tasks import TaskBatch
from distill.model.run import Runnable


class TargetError(ValueError):
    """No circuit of the ranking found meets the target; the message says what was reached."""


class Judge:
    """Task losses of node sets on one fixed batch of validation prompts."""

    def __init__(
        self, model: Runnable, means: Means, train: TaskBatch, val: TaskBatch, *, calibrated: bool, margin: float
    ) -> None:
        self.model, self.val, self.calibrated, self.margin = model, val, calibrated, margin
        self.means = means.to(next(model.parameters()).device)
        self.fit = take(train, torch.arange(min(len(train), len(val)) // 2))
        self.runs = 0

    @torch.no_grad()
    def difference(self, nodes: Nodes | None, batch: TaskBatch, *, competition: bool = False) -> Float[Tensor, "n"]:
        """Logit differences of the circuit, or with None of the full model."""
        tap = None if nodes is None else MaskTap(nodes, self.means, competition=competition)
        self.runs += 1
        return answer_difference(self.model, batch, tap).float().cpu()

    def loss(self, nodes: Nodes | None) -> float:
        """Task loss before calibration."""
        return float(two_way_loss(self.difference(nodes, self.val)))

    def calibration(self, nodes: Nodes) -> Calibration:
        """Scale and shift fitted on training prompts."""
        return calibrate(self.difference(nodes, self.fit), self.fit.orientation)

    def judged(self, nodes: Nodes) -> float:
        """What is held against the target: loss, calibrated if asked for, plus the margin."""
        difference = self.difference(nodes, self.val)
        if self.calibrated:
            difference = self.calibration(nodes)(difference, self.val.orientation)
        each = softplus(-difference)
        return float(each.mean()) + self.margin * float(each.std(correction=0)) / math.sqrt(len(each))

    def report(self, nodes: Nodes) -> dict[str, float]:
        """Losses of the final circuit: as it is, calibrated, and with pruned channels competing."""
        difference = self.difference(nodes, self.val)
        calibrated = self.calibration(nodes)(difference, self.val.orientation)
        competing = self.difference(nodes, self.val, competition=True)
        losses = {"circuit": difference, "calibrated": calibrated, "competition": competing}
        return {name: float(two_way_loss(value)) for name, value in losses.items()}

    def importance(self, masks: NodeMasks, kept: Bool[Tensor, "groups"]) -> Float[Tensor, "groups"]:
        """First-order change of the loss on removing each group: -dJ/dm = -gradient x (activation - mean)."""
        weight = kept.float().requires_grad_()
        self.runs += 1
        loss = two_way_loss(answer_difference(self.model, self.val, MaskTap(masks.spread(weight), self.means)))
        return -torch.autograd.grad(loss, weight)[0]


def as_nodes(masks: NodeMasks, kept: Bool[Tensor, "groups"]) -> Nodes:
    """The node set of some groups."""
    return {location: mask.cpu() for location, mask in masks.spread(kept).items()}


def smallest(
    masks: NodeMasks, scores: Float[Tensor, "groups"], judge: Judge, target: float, *, refine: bool = True
) -> tuple[int | None, dict[int, float]]:
    """The smallest number of groups, taken by descending score (ties by index), whose loss meets the target.

    A grid from few to many comes first, as the loss is not monotone, then (`refine`) bisection below the first number
    that meets it, to 1 in 32. Returns the number, or None where no number on the grid meets the target, and all losses
    seen by number of groups.
    """
    order = torch.argsort(scores, descending=True, stable=True)
    seen: dict[int, float] = {}

    def meets(count: int) -> bool:
        seen[count] = judge.judged(as_nodes(masks, _first(order, count)))
        return seen[count] <= target

    low = 0
    for high in _grid(int((scores > 0).sum()), len(scores)):
        if meets(high):
            break
        low = high
    else:
        return None, seen
    while refine and high - low > max(1, high // 32):
        middle = (low + high) // 2
        low, high = (low, middle) if meets(middle) else (middle, high)
    return high, seen


def _first(order: Int[Tensor, "groups"], count: int) -> Bool[Tensor, "groups"]:
    kept = torch.zeros_like(order, dtype=torch.bool)
    kept[order[:count]] = True
    return kept


def discretise(
    masks: NodeMasks, judge: Judge, goals: Sequence[float], full: float
) -> tuple[Bool[Tensor, "groups"], float]:
    """The groups of largest tau, as few as meet the first goal that can be met, and that goal.

    Goals are losses in nats, the strictest first. TargetError naming the best loss seen where the last is not met.
    """
    tau = masks.tau.detach()
    order = torch.argsort(tau, descending=True, stable=True)
    count, seen, target = None, {}, goals[-1]
    for goal in goals:
        if count is None:
            (count, found), target = smallest(masks, tau, judge, goal), goal
            seen |= found
    if count is None:
        closest, best = min(seen.items(), key=lambda item: item[1])
        nodes = int(masks.count[_first(order, closest)].sum())
        raise TargetError(
            f"target: {target:.4g} nats is out of reach: the full model has {full:.4g}, the best circuit found "
            f"{best:.4g} with {nodes} nodes; give a higher target, a relative one, or more steps"
        )
    return _first(order, count), target


def _grid(on: int, total: int) -> list[int]:
    """Counts to try, upwards by factors of two: from a sixteenth of the masks that are on to all of them."""
    counts = {round(max(on, 1) * 2.0**step) for step in range(-4, 40)}
    return sorted({count for count in counts if 1 <= count < total} | {total})


def clean_up(
    masks: NodeMasks,
    kept: Bool[Tensor, "groups"],
    judge: Judge,
    target: float,
    runs: int,
    spent: Callable[[], float] = lambda: 0.0,
) -> Bool[Tensor, "groups"]:
    """Removes kept groups while the loss on the validation prompts meets the target.

    Groups are tried in batches, in the order of their first-order importance, which is taken anew after each removal;
    a batch doubles after a success and halves after a failure, and a group that fails alone stays. Ends when every
    group left has failed alone, after `runs` validation runs, or when `spent` reaches 1.
    """
    needed = torch.zeros_like(kept)
    last_run = judge.runs + runs
    size = max(1, int(kept.sum()) // 4)
    ranked = torch.empty(0, dtype=torch.long)
    while judge.runs < last_run and spent() < 1:
        if not len(ranked):
            importance = judge.importance(masks, kept)
            importance[~kept | needed] = math.inf
            order = torch.argsort(importance, stable=True)
            ranked = order[: int((kept & ~needed).sum())]
            if not len(ranked):
                break
        trial = kept.clone()
        trial[ranked[:size]] = False
        if judge.judged(as_nodes(masks, trial)) <= target:
            kept, ranked = trial, ranked[:0]
            size *= 2
        elif min(size, len(ranked)) == 1:
            needed[ranked[0]] = True
            ranked = ranked[1:]
        else:
            size = max(1, min(size, len(ranked)) // 2)
    return kept

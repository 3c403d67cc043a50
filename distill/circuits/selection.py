"""From scores to a node set: the fewest nodes, by rank, that meet a goal on a fixed batch of held-out prompts."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from distill.circuits.settings import Goal


class TargetError(ValueError):
    """No circuit of the ranking found meets the target; the message says what was reached."""


def ranking(scores: Float[Tensor, "groups"]) -> Int[Tensor, "groups"]:
    """Groups by descending score, ties by index."""
    return torch.argsort(scores, descending=True, stable=True)


def first(order: Int[Tensor, "groups"], count: int) -> Bool[Tensor, "groups"]:
    """The set of the first `count` groups of a ranking."""
    kept = torch.zeros_like(order, dtype=torch.bool)
    kept[order[:count]] = True
    return kept


def smallest(
    scores: Float[Tensor, "groups"], meets: Callable[[Bool[Tensor, "groups"]], bool], *, refine: bool = True
) -> int | None:
    """The smallest number of groups, taken by descending score, that meets a goal; None where no number tried does.

    A grid from few to many comes first, as the loss is not monotone, then (`refine`) bisection below the first number
    that meets it, to 1 in 32.
    """
    order = ranking(scores)
    low = 0
    for high in grid(int((scores > 0).sum()), len(scores)):
        if meets(first(order, high)):
            break
        low = high
    else:
        return None
    while refine and high - low > max(1, high // 32):
        middle = (low + high) // 2
        low, high = (low, middle) if meets(first(order, middle)) else (middle, high)
    return high


def grid(on: int, total: int) -> list[int]:
    """Counts to try, upwards by factors of two: from a sixteenth of the masks that are on to all of them."""
    counts = {round(max(on, 1) * 2.0**step) for step in range(-4, 40)}
    return sorted({count for count in counts if 1 <= count < total} | {total})


def discretise(
    scores: Float[Tensor, "groups"],
    goals: Sequence[Goal],
    meets: Callable[[Bool[Tensor, "groups"], Goal], bool],
) -> tuple[Bool[Tensor, "groups"], Goal] | None:
    """The best-scored groups, as few as meet the first goal that can be met, and that goal; None where none can.

    Goals come the strictest first.
    """
    for goal in goals:
        count = smallest(scores, lambda kept, goal=goal: meets(kept, goal))
        if count is not None:
            return first(ranking(scores), count), goal
    return None

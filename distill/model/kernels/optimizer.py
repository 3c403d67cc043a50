"""AdamW and the projection of a weight after it, compiled: one pass over gradient and moments, float32, CPU."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from distill.model.kernels.build import call, threads, workspace
from distill.model.kernels.linear import Pattern
from distill.model.kernels.projection import keep_

SPARSE_STEP = 0.25
"""Share of non-zeros, before and after a step, up to which only candidates are written; with more, all entries are."""

_CHUNK = 1 << 14
_ROOM = _CHUNK + 64
_LEAST = 2.0**-149  # the smallest float32 above 0: every entry that is not zero reaches it
# The bound lies under the last cut by a share that shrinks where it was too high, as a second pass costs about as much
# as the first. It recovers slowly, faster where the low bound lets through so many candidates that they cost as much.
_SLACK, _LEAST_SLACK, _SHRINK, _RECOVER, _HURRY = 0.9, 0.5, 0.9, 1.002, 1.05
_MANY = 1 / 16


@dataclass(frozen=True, kw_only=True)
class AdamStep:
    """What one step of AdamW is made with; the names are torch's."""

    rate: float
    """Learning rate."""
    betas: tuple[float, float]
    """Decay of the two moments per step."""
    eps: float
    """Added to the root of the second moment."""
    weight_decay: float
    """Per step and unit of rate."""
    step: int
    """Steps of this parameter, with this one: 1 at first."""
    scale: float = 1.0
    """What the gradient is multiplied with."""

    def numbers(self) -> tuple[float, ...]:
        """As the compiled functions take them."""
        first, second = self.betas
        return (
            float(self.scale),
            1.0 - first,
            1.0 - second,
            float(self.rate * self.weight_decay),
            self.rate / (1.0 - first**self.step),
            1.0 / math.sqrt(1.0 - second**self.step),
            float(self.eps),
        )


def adamw_(weight: Tensor, grad: Tensor, mean: Tensor, square: Tensor, adam: AdamStep) -> None:
    """One step of AdamW in place, as `torch.optim.AdamW` but for rounding: float32, CPU, contiguous, any one shape.

    Arguments:
        weight: what is trained; counts as changed.
        grad: its gradient; stays as it is.
        mean: first moment.
        square: second moment.
        adam: the settings.
    """
    n = weight.numel()
    call("adamw_dense", weight.detach(), grad, mean, square, n, *adam.numbers(), threads(n))
    torch.autograd.graph.increment_version(weight)


def sum_of_squares(x: Tensor) -> float:
    """Of all entries (float32, CPU, contiguous); the same bits on any number of threads."""
    n = x.numel()
    sums = torch.empty(-(-n // _CHUNK), dtype=torch.float64)
    call("sum_of_squares", x.detach(), n, sums, threads(n))
    return math.fsum(sums.tolist())


class Projected:
    """A weight that AdamW moves and that is projected after each step, with what one step tells the next.

    Nothing here has to be saved: what a step gives depends on the weight, its moments and its gradient alone.
    """

    def __init__(self, weight: Tensor, *, floor: int = 0, axis: int | None = None) -> None:
        """`weight` is float32, CPU, contiguous; `floor` entries at least stay in each row (axis 0) or column (1)."""
        assert not floor or (axis in (0, 1) and weight.dim() == 2), f"{floor}, {axis}, {tuple(weight.shape)}"
        self.weight = weight
        self.floor, self.axis = floor, axis or 0
        self.rows, self.columns = weight.shape if weight.dim() == 2 else (1, weight.numel())
        self.passes = 0
        """Over the moments in the last step; 0 where all entries were written."""
        units = 0 if not floor else self.rows if axis == 0 else self.columns
        # Of all entries, then of each unit: what reaches its bound may stay.
        self._bound = torch.full((1 + units,), _LEAST)
        self._slack = _SLACK
        self._nonzeros = weight.numel()
        self._seen: tuple[int, int] | None = None

    def step(
        self, grad: Tensor, mean: Tensor, square: Tensor, adam: AdamStep, count: int, *, lists: bool = False
    ) -> int:
        """AdamW as `adamw_`, then the `count` largest and the floor stay, ties at the lowest index, as in `project_`.

        Arguments:
            grad: gradient; stays as it is.
            mean: first moment.
            square: second moment.
            adam: the settings.
            count: entries that stay, less than all.
            lists: whether the weight's `Pattern` is made on the way, for the products to come.

        Returns the entries that are not zero.
        """
        most = SPARSE_STEP * self.weight.numel()
        if self._seen == self._state() and max(self._nonzeros, count) <= most:
            self._nonzeros = self._sparse_step(grad, mean, square, adam, count, lists)
        else:
            self._nonzeros = self._dense_step(grad, mean, square, adam, count)
        self._seen = self._state()
        return self._nonzeros

    def _state(self) -> tuple[int, int]:
        """What is another once somebody else has changed the weight."""
        return self.weight.data_ptr(), self.weight._version

    def _dense_step(self, grad: Tensor, mean: Tensor, square: Tensor, adam: AdamStep, count: int) -> int:
        adamw_(self.weight, grad, mean, square, adam)
        cut, nonzeros = keep_(self.weight, count, floor=self.floor, axis=self.axis)
        self.passes = 0
        self._bound.fill_(max(self._slack * cut, _LEAST) if cut < math.inf else _LEAST)
        return nonzeros

    def _sparse_step(self, grad: Tensor, mean: Tensor, square: Tensor, adam: AdamStep, count: int, lists: bool) -> int:
        weight, rows, columns = self.weight.detach(), self.rows, self.columns
        pieces = -(-weight.numel() // _CHUNK)
        space = workspace(2 * pieces * _ROOM)
        found, result = torch.empty(pieces, dtype=torch.int64), torch.empty(3, dtype=torch.int64)
        chosen = (space[pieces * _ROOM :], space, found)
        call(
            "adamw_project",
            *(weight, grad, mean, square, rows, columns, count, self.floor, self.axis, self._bound, *chosen, result),
            *(*adam.numbers(), self._slack, threads(weight.numel())),
        )
        nonzeros, self.passes, candidates = result.tolist()
        many = candidates - nonzeros > _MANY * weight.numel()
        slack = self._slack * (_SHRINK if self.passes > 1 else _HURRY if many else _RECOVER)
        self._slack = min(max(slack, _LEAST_SLACK), _SLACK)
        self._write(chosen, nonzeros if lists and self.weight.dim() == 2 else None)
        return nonzeros

    def _write(self, chosen: tuple[Tensor, ...], nonzeros: int | None) -> None:
        """Changes the weight; makes its pattern where the number of its entries is given."""
        shape = (self.rows, self.columns)
        if nonzeros is None:
            call("adamw_write", self.weight.detach(), *shape, *chosen, None, None, None, None)
            torch.autograd.graph.increment_version(self.weight)
            return
        row_start, column_start = (torch.empty(m + 1, dtype=torch.int32) for m in shape)
        # One place more: there an entry that does not stay is written at the end.
        by_row, by_column = (torch.empty(nonzeros + 1, dtype=torch.int64) for _ in range(2))
        call("adamw_write", self.weight.detach(), *shape, *chosen, row_start, by_row, column_start, by_column)
        torch.autograd.graph.increment_version(self.weight)
        Pattern.remember(self.weight, row_start, by_row[:nonzeros], column_start, by_column[:nonzeros])

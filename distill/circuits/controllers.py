"""What a node costs while masks are learned: the controllers behind one interface.

Each step minimises  sum_i w_i J_i + price * (number of nodes)  over the losses J_i that have a limit. The source fixes
the price [G A.5] and has to search for it. The constraint controller minimises the number of nodes subject to the
limits: each has a multiplier that grows while its loss is above the limit and shrinks while it is below, so that there
is nothing to search for. Edge Pruning (arXiv 2406.16778) holds the number of nodes instead.
"""

import math
from collections.abc import Mapping
from typing import Protocol, runtime_checkable

from torch import Tensor

from distill.circuits.settings import Goal, PruneConfig


@runtime_checkable
class Controller(Protocol):
    """The weights of one step's objective, and what they learn from it."""

    def objective(self, losses: Mapping[str, Tensor], count: Tensor) -> Tensor:
        """What one step minimises."""
        ...

    def update(self, losses: Mapping[str, float], count: float, progress: float) -> None:
        """Takes in the losses of one step, the number of nodes, and the share of the steps that is done."""
        ...


class Coefficient:
    """A fixed price of a node in nats."""

    def __init__(self, price: float) -> None:
        self.price = price

    def objective(self, losses: Mapping[str, Tensor], count: Tensor) -> Tensor:
        return _total(losses) + self.price * count

    def update(self, losses: Mapping[str, float], count: float, progress: float) -> None:
        return


class Constraint:
    """A price that follows the limits.

    The objective is (number of nodes) + sum_i lambda_i J_i, here divided by the sum of the lambdas, so that `price` is
    one over that sum. Each step adds rate * clip(log(EMA(J_i) / limit_i), -1, 1) to log lambda_i.
    """

    def __init__(self, limits: Mapping[str, float], *, price: float, rate: float, smoothing: float) -> None:
        self.limits, self.rate, self.smoothing = dict(limits), rate, smoothing
        self.multipliers = {name: 1 / price / len(limits) for name in limits}
        self.means: dict[str, float] = {}

    @property
    def price(self) -> float:
        """Price of a node in nats."""
        return 1 / sum(self.multipliers.values())

    def objective(self, losses: Mapping[str, Tensor], count: Tensor) -> Tensor:
        return self.price * (_total({name: self.multipliers[name] * loss for name, loss in losses.items()}) + count)

    def update(self, losses: Mapping[str, float], count: float, progress: float) -> None:
        for name, loss in losses.items():
            mean = self.means.get(name, loss)
            self.means[name] = mean = self.smoothing * mean + (1 - self.smoothing) * loss
            excess = math.log(max(mean, 1e-12) / self.limits[name])
            self.multipliers[name] *= math.exp(self.rate * min(max(excess, -1.0), 1.0))


class Lagrangian:
    """A number of nodes that is held by two multipliers, which climb with its excess over what is aimed at.

    The objective is sum_i J_i + a (s - t) + b (s - t)^2 for s the share of nodes kept and t the one aimed at, which
    falls linearly from 1 to `density` over the first 70% of the steps.
    """

    RATE = 0.8
    WARMING = 0.7

    def __init__(self, total: int, density: float) -> None:
        self.total, self.density = total, density
        self.linear, self.square = 0.0, 0.0
        self.aim = 1.0

    def objective(self, losses: Mapping[str, Tensor], count: Tensor) -> Tensor:
        excess = count / self.total - self.aim
        return _total(losses) + self.linear * excess + self.square * excess.square()

    def update(self, losses: Mapping[str, float], count: float, progress: float) -> None:
        excess = count / self.total - self.aim
        self.linear += self.RATE * excess
        self.square += self.RATE * excess**2
        self.aim = 1 - (1 - self.density) * min(1.0, progress / self.WARMING)


def _total(losses: Mapping[str, Tensor]) -> Tensor:
    parts = list(losses.values())
    return sum(parts[1:], parts[0])


def limits_of(goal: Goal) -> dict[str, float]:
    """Limits in nats by the name of the loss."""
    limits = {"task": goal.task}
    return limits if goal.faithful is None else {**limits, "faithful": goal.faithful}


def new_controller(config: PruneConfig, goal: Goal, total: int, *, price: float | None = None) -> Controller:
    """The controller of `config` for a goal and a model of `total` nodes; `price` to start from instead of `k_coef`."""
    price = config.k_coef if price is None else price
    if config.controller == "coefficient":
        return Coefficient(config.k_coef)
    if config.controller == "lagrangian":
        return Lagrangian(total, config.density)
    return Constraint(limits_of(goal), price=price, rate=config.price_rate, smoothing=config.smoothing)

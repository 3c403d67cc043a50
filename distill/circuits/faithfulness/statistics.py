"""Small statistics of the checks: ranks among controls, intervals, and the correction for many tests."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from scipy import stats
from torch import Tensor

RESAMPLES = 999


def by_pair(values: Float[Tensor, "rows"]) -> Float[Tensor, "pairs"]:
    """Mean over the two members of each pair, clean rows first: pairs are independent, the members of one are not."""
    return values.view(2, -1).mean(0)


def rank_p(value: float, controls: Sequence[float], *, high: bool) -> float:
    """Chance of a rank as good as that of `value` among controls drawn alike: (1 + number as good) / (1 + number).

    This is the Monte-Carlo form of a permutation test. `high` says that larger is better.
    """
    as_good = sum(control >= value if high else control <= value for control in controls)
    return (1 + as_good) / (1 + len(controls))


def share_p(hits: int, n: int, share: float | int) -> float:
    """Chance of `hits` or more out of `n` if each came with probability `share`: a one-sided binomial test."""
    return float(stats.binomtest(hits, n, share, alternative="greater").pvalue)


def larger_p(one: Float[Tensor, "n"], other: Float[Tensor, "m"], *, seed: int) -> float:
    """Chance of a difference of means as large as mean(one) - mean(other) if labels were exchanged at random.

    1 where either has fewer than two values, from which nothing follows.
    """
    if min(len(one), len(other)) < 2:
        return 1.0
    found = stats.permutation_test(
        (one.double().cpu().numpy(), other.double().cpu().numpy()),
        lambda a, b, axis: np.mean(a, axis=axis) - np.mean(b, axis=axis),
        vectorized=True,
        n_resamples=RESAMPLES,
        alternative="greater",
        rng=np.random.default_rng(seed),
    )
    return float(found.pvalue)


def mean_interval(values: Float[Tensor, "n"], *, seed: int = 0) -> tuple[float, float]:
    """95% bootstrap interval (percentile method) of the mean; both ends are the value where there is one only."""
    if len(values) < 2:
        return float(values.mean()), float(values.mean())
    found = stats.bootstrap(
        (values.double().cpu().numpy(),),
        np.mean,
        n_resamples=RESAMPLES,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def corrected(chances: Sequence[float]) -> list[float]:
    """Benjamini and Hochberg's correction for the number of tests, in the order given."""
    return [float(p) for p in stats.false_discovery_control(np.asarray(chances))] if chances else []


def spread_of(name: str, values: Float[Tensor, "n"]) -> dict[str, float]:
    """Mean, median, interquartile range, 95th and 99th percentile and maximum, as `{name}_mean` and so on."""
    shares = torch.tensor([0.25, 0.5, 0.75, 0.95, 0.99], dtype=torch.float64, device=values.device)
    low, median, high, p95, p99 = torch.quantile(values.double(), shares).tolist()
    found = {"mean": float(values.mean()), "median": median, "iqr": high - low, "p95": p95, "p99": p99}
    return {f"{name}_{statistic}": value for statistic, value in {**found, "max": float(values.max())}.items()}


def percentile(values: Sequence[float], share: float | int) -> float:
    """A percentile (0 to 100), interpolated between the values."""
    return float(np.percentile(np.asarray(values, dtype=np.float64), share))


def refit(
    differences: Float[Tensor, "sets n"], *, largest: float = 100.0
) -> tuple[Float[Tensor, "sets"], Float[Tensor, "sets"]]:
    """For each set of logit differences d the least mean log(1 + exp(-s d)) over 0 <= s <= largest, and that s.

    The loss is convex in s, so its derivative is bisected, for all sets at once. Losses are at most ln 2 (s = 0); those
    under 1e-12, which only say that the scale was bounded, are given as 0.
    """
    d = differences.double()

    def slope(scale: Tensor) -> Tensor:
        return -(d * torch.sigmoid(-scale[:, None] * d)).mean(1)

    low = torch.zeros(len(d), dtype=torch.float64, device=d.device)
    high = torch.full_like(low, largest)
    low = torch.where(slope(high) < 0, high, low)
    high = torch.where(slope(torch.zeros_like(high)) >= 0, 0.0, high)
    low = torch.minimum(low, high)
    for _ in range(60):
        middle = (low + high) / 2
        falling = slope(middle) < 0
        low, high = torch.where(falling, middle, low), torch.where(falling, high, middle)
    scale = (low + high) / 2
    losses = torch.nn.functional.softplus(-scale[:, None] * d).mean(1)
    return torch.where(losses < 1e-12, 0.0, losses), scale

"""Ranks, intervals and corrections against arithmetic by hand."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.circuits.faithfulness.statistics import (
    by_pair,
    corrected,
    larger_p,
    mean_interval,
    percentile,
    rank_p,
    refit,
    share_p,
    spread_of,
)


def test_ranks_by_hand():
    assert rank_p(5.0, [1.0, 2.0, 3.0, 9.0], high=True) == pytest.approx(2 / 5)
    assert rank_p(5.0, [1.0, 2.0, 3.0, 9.0], high=False) == pytest.approx(4 / 5)
    assert rank_p(1.0, [1.0], high=True) == 1.0


def test_pairs_count_once():
    assert by_pair(torch.tensor([1.0, 2.0, 3.0, 6.0])).tolist() == [2.0, 4.0]


def test_shares_by_hand():
    assert share_p(3, 3, 0.5) == pytest.approx(1 / 8)
    assert share_p(2, 3, 0.5) == pytest.approx(4 / 8)


def test_a_permutation_test_tells_means_apart():
    generator = torch.Generator().manual_seed(0)
    one, other = torch.rand(20, generator=generator) + 1, torch.rand(20, generator=generator)
    assert larger_p(one, other, seed=0) == pytest.approx(1 / 1000)
    assert larger_p(other, one, seed=0) == 1.0
    # Of the 6 ways to label two and two, one is as extreme as what is seen.
    assert larger_p(torch.tensor([2.0, 3.0]), torch.tensor([0.0, 1.0]), seed=0) == pytest.approx(1 / 6)
    assert larger_p(torch.ones(1), torch.zeros(9), seed=0) == 1.0


def test_intervals_hold_the_mean():
    low, high = mean_interval(torch.tensor([0.0, 1.0] * 50))
    assert 0.3 < low < 0.5 < high < 0.7
    assert mean_interval(torch.tensor([2.0])) == (2.0, 2.0)
    assert mean_interval(torch.full((4,), 3.0)) == (3.0, 3.0)


def test_corrections_by_hand():
    # Benjamini and Hochberg: p * m / rank, not falling with the rank.
    assert corrected([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.04, 0.04])
    assert corrected([]) == []
    assert corrected([0.2]) == pytest.approx([0.2])


def test_spreads_and_percentiles_by_hand():
    found = spread_of("x", torch.arange(101.0))
    expected = {"x_mean": 50, "x_median": 50, "x_iqr": 50, "x_p95": 95, "x_p99": 99, "x_max": 100}
    assert found == pytest.approx(expected)
    assert percentile([0.0, 10.0], 90) == pytest.approx(9.0)


def test_refits_by_hand():
    # Right by 1 as often as wrong by 1: no scale helps. Three times as often: the odds 3 give s = ln 3.
    even, odds = torch.tensor([1.0, -1.0, 1.0, -1.0]), torch.tensor([1.0, 1.0, 1.0, -1.0])
    wrong, right = -torch.ones(4), torch.ones(4)
    losses, scales = refit(torch.stack([even, odds, wrong, right]))
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert losses.tolist() == pytest.approx([math.log(2), entropy, math.log(2), 0.0], abs=1e-9)
    assert scales.tolist() == pytest.approx([0.0, math.log(3), 0.0, 100.0], abs=1e-9)
    # At the largest scale a loss of e^-100 is left, which says only where the scale was bounded.
    assert losses[3] == 0 < refit(torch.tensor([[0.2]]))[0][0]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-20, 20), min_size=1, max_size=20))
def test_no_scale_beats_the_refitted_one(values):
    difference = torch.tensor(values, dtype=torch.float64)
    losses, _ = refit(difference[None])
    for scale in (0.0, 0.01, 0.3, 1.0, 5.0, 100.0):
        assert float(losses[0]) <= float(torch.nn.functional.softplus(-scale * difference).mean()) + 1e-9

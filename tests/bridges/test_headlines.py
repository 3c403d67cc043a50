"""Published results rerun: the measures by hand."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from bridges.headlines import HEADLINES, Found, save, table
from bridges.headlines.circuits import _interval
from bridges.headlines.models import _wider, kurtosis
from distill.artifact import read_record


def test_kurtosis_by_hand() -> None:
    # Two values alike: fourth moment 1, variance 1. One of four: deviations (3, -1, -1, -1) / 4.
    rows = torch.tensor([[1.0, -1.0, 1.0, -1.0], [1.0, 0.0, 0.0, 0.0], [2.0, 2.0, 2.0, 2.0]], dtype=torch.float64)
    one = (81 + 3) / 4 / (12 / 4) ** 2
    assert kurtosis(rows).tolist() == pytest.approx([1.0, one, 0.0])


def test_kurtosis_of_a_normal_distribution_is_three() -> None:
    x = torch.randn(4, 200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert kurtosis(x).tolist() == pytest.approx([3.0] * 4, abs=0.1)


def test_wider_pairs() -> None:
    points = {
        "narrow": {"width": 64.0, "nonzeros": 1000.0},
        "wide": {"width": 128.0, "nonzeros": 1050.0},
        "dense": {"width": 256.0, "nonzeros": 9000.0},
    }
    assert _wider(points) == [(points["wide"], points["narrow"])]


def test_interval_of_ratios() -> None:
    assert _interval(np.log([2.0])) == pytest.approx((2.0, 2.0))
    low, high = _interval(np.log([2.0, 4.0, 8.0]))
    assert 2.0 <= low < 4.0 < high <= 8.0


def test_outcomes_are_saved_with_their_rules(tmp_path: Path) -> None:
    found = Found(ours="so it is", holds=None, record={"x": 1.5})
    save("kurtosis", found, tmp_path, {"seconds": 1.0})
    record = read_record(tmp_path / "kurtosis.json", what="result")
    assert record["rule"] == HEADLINES["kurtosis"].rule and record["numbers"] == {"x": 1.5} and record["holds"] is None
    assert not (tmp_path / "kurtosis.png").exists()
    assert "| so it is | not measured | 1 |" in table({"kurtosis": (found, 1.2)})
    json.loads((tmp_path / "kurtosis.json").read_text())

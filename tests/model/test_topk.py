import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distill.model.topk import abs_topk, top_mask


def test_the_largest_in_magnitude_stay_with_their_sign(path: str) -> None:
    x = torch.tensor([[1.0, -4.0, 2.0, 3.0]])
    assert abs_topk(x, 2).tolist() == [[0.0, -4.0, 0.0, 3.0]]


def test_ties_go_to_the_lower_index(path: str) -> None:
    x = torch.tensor([[1.0, -2.0, 2.0, 2.0]])
    assert abs_topk(x, 2).tolist() == [[0.0, -2.0, 2.0, 0.0]]


def test_fewer_non_zeros_than_k_are_all_that_is_kept(path: str) -> None:
    x = torch.tensor([[0.0, 5.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]], requires_grad=True)
    out = abs_topk(x, 3)
    assert out.tolist() == [[0.0, 5.0, 0.0, 0.0], [1.0, 1.0, 1.0, 0.0]]
    out.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[0.0, 1.0, 0.0, 0.0], [1.0, 1.0, 1.0, 0.0]]


def test_from_the_width_on_nothing_is_dropped(path: str) -> None:
    x = torch.randn(3, 4)
    assert abs_topk(x, 4) is x
    assert abs_topk(x, 9) is x


def test_not_a_number_counts_as_the_largest(path: str) -> None:
    x = torch.tensor([[1.0, math.nan, -3.0, 2.0], [4.0, 1.0, 2.0, 3.0]])
    out = abs_topk(x, 2)
    assert out[0].isnan().tolist() == [False, True, False, False] and out[0, [0, 2, 3]].tolist() == [0.0, -3.0, 0.0]
    assert out[1].tolist() == [4.0, 0.0, 0.0, 3.0]


def test_no_channel_kept_is_refused() -> None:
    with pytest.raises(ValueError, match="k: 0"):
        abs_topk(torch.ones(2), 0)


@given(
    rows=st.lists(st.lists(st.integers(-3, 3), min_size=7, max_size=7), min_size=1, max_size=5),
    k=st.integers(1, 7),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_it_equals_a_stable_sort(rows: list[list[int]], k: int, dtype: torch.dtype) -> None:
    x = torch.tensor(rows, dtype=dtype)
    mask = top_mask(x, k)
    for row, kept in zip(rows, mask.tolist(), strict=True):
        order = sorted(range(7), key=lambda i: (-abs(row[i]), i))[:k]
        assert [i for i in range(7) if kept[i]] == sorted(i for i in order if row[i] != 0)

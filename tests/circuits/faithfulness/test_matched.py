"""Random node sets: matched by count and activity, outside the circuit where there is room, q with its k."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.circuits.ablation import Means
from distill.circuits.faithfulness.matched import activity_bins, random_nodes, random_sets


def means_of(**magnitude: torch.Tensor) -> Means:
    return Means(values={}, magnitude={f"0.attn.{name}": value for name, value in magnitude.items()}, model="m",
                 data="d", tokens=1)  # fmt: skip


def test_bins_by_hand():
    bins = activity_bins(torch.tensor([0.3, 0.1, 0.2, 0.9, 0.5]), 2)
    assert [part.tolist() for part in bins] == [[1, 2, 0], [4, 3]]
    assert len(activity_bins(torch.ones(3), 10)) == 3


def test_random_sets_match_in_count_and_activity_and_avoid_the_circuit():
    activity = torch.arange(40.0)
    nodes = {"0.attn.v": torch.zeros(40, dtype=torch.bool)}
    nodes["0.attn.v"][[0, 1, 2, 39]] = True
    seen = torch.zeros(40, dtype=torch.bool)
    for drawn in random_sets(nodes, means_of(v=activity), 20, torch.Generator().manual_seed(0), bins=4):
        assert [int(drawn["0.attn.v"][part].sum()) for part in activity_bins(activity, 4)] == [3, 0, 0, 1]
        assert not bool((drawn["0.attn.v"] & nodes["0.attn.v"]).any())
        seen |= drawn["0.attn.v"]
    assert int(seen.sum()) > 12


def test_a_bin_with_too_few_others_is_filled_from_the_circuit():
    nodes = {"0.attn.v": torch.tensor([True, True, True, False])}
    drawn = random_nodes(nodes, means_of(v=torch.ones(4)), torch.Generator().manual_seed(0), bins=1)["0.attn.v"]
    assert int(drawn.sum()) == 3 and bool(drawn[3])


def test_a_key_is_drawn_with_its_query_where_the_circuit_has_both():
    tied = torch.zeros(30, dtype=torch.bool)
    tied[:3] = True
    activity = means_of(q=torch.rand(30), k=torch.rand(30))
    for drawn in random_sets({"0.attn.q": tied, "0.attn.k": tied.clone()}, activity, 5, torch.Generator()):
        assert torch.equal(drawn["0.attn.q"], drawn["0.attn.k"])
    other = tied.roll(1)
    loose = random_sets({"0.attn.q": tied, "0.attn.k": other}, activity, 5, torch.Generator().manual_seed(0))
    assert any(not torch.equal(drawn["0.attn.q"], drawn["0.attn.k"]) for drawn in loose)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=25), st.integers(1, 12), st.integers(0, 99))
def test_counts_match_for_any_circuit(mask, bins, seed):
    nodes = {"0.attn.v": torch.tensor(mask)}
    activity = torch.rand(len(mask), generator=torch.Generator().manual_seed(seed))
    for drawn in random_sets(nodes, means_of(v=activity), 3, torch.Generator().manual_seed(seed), bins=bins):
        assert int(drawn["0.attn.v"].sum()) == sum(mask)

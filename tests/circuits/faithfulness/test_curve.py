"""Faithfulness curve: areas, ranking and edge counts by hand; a circuit that outshouts the model is flagged."""

import pytest
import torch

from distill.circuits.edges import edge_total, induced_edge_set
from distill.circuits.faithfulness.curve import areas, curve, edges_by_rank, ranking


def test_areas_by_hand():
    # f rises to 2 at a half and falls back to 1: areas 1/2 + 3/4, and |1 - f| from 1 to 1 (by its ends), then 1 to 0.
    cpr, cmd = areas({0.5: 2.0, 1.0: 1.0})
    assert cpr == pytest.approx(0.5 * 2 / 2 + 0.5 * 3 / 2)
    assert cmd == pytest.approx(0.5 * (1 + 1) / 2 + 0.5 * (1 + 0) / 2)
    assert areas({1.0: 1.0}) == pytest.approx((0.5, 0.5))
    assert areas({0.5: 1.0}) == pytest.approx((0.75, 0.25))


def test_the_circuit_comes_first_and_each_part_by_effect():
    nodes = {"0.attn.q": torch.tensor([False, True, False]), "0.attn.k": torch.tensor([True, False])}
    effects = {"0.attn.q": torch.tensor([0.5, 0.1, 9.0]), "0.attn.k": torch.tensor([-0.2, -3.0])}
    rank = ranking(nodes, effects)
    assert rank["0.attn.q"].tolist() == [4, 1, 2] and rank["0.attn.k"].tolist() == [0, 3]


def test_edge_counts_are_those_of_the_nodes_so_far(planted):
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(sum(planted.widths.values()), generator=generator)
    rank = dict(zip(planted.widths, order.split(list(planted.widths.values())), strict=True))
    edges = edges_by_rank(planted, rank)
    for count in (0, 1, 30, 60, len(order)):
        nodes = {location: places < count for location, places in rank.items()}
        assert int(edges[count]) == edge_total(induced_edge_set(planted, nodes))


def test_the_planted_circuit_gives_what_the_model_gives(circuit, planted, make_prompts):
    check = curve(planted, circuit, make_prompts(16, 5))
    assert check.verdict == "pass" and check.value < 1.1
    assert check.details["f_circuit"] == pytest.approx(1, abs=0.1)
    assert check.details["f_1"] == pytest.approx(1, abs=1e-5)
    assert check.details["CPR"] == pytest.approx(1, abs=0.05) and check.details["CMD"] < 0.05


def test_a_circuit_stronger_than_the_model_is_flagged(planted, make_circuit, make_prompts):
    # A second value holds the first one back by half; the circuit leaves it out.
    with torch.no_grad():
        planted.layers[0].attn_v.weight[1] = planted.layers[0].attn_v.weight[0]
        planted.layers[0].attn_out.weight[3, 1] = -0.5
    check = curve(planted, make_circuit(planted), make_prompts(16, 5))
    assert check.verdict == "flag" and check.details["f_circuit"] > 1.1


def test_a_model_that_cannot_do_the_task_has_no_curve(circuit, planted, make_prompts):
    batch = make_prompts(8, 5)
    turned = type(batch)(**{**vars(batch), "answer": batch.other, "other": batch.answer})
    check = curve(planted, circuit, turned)
    assert check.verdict == "skipped" and "not above that without any node" in check.reason

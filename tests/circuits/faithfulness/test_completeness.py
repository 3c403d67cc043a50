"""Completeness: the planted circuit is complete, one of two ways is not."""

from dataclasses import replace

import pytest
import torch

from distill.circuits.faithfulness.completeness import completeness, locations_of
from distill.circuits.masks import all_nodes


def test_the_planted_circuit_is_complete(circuit, planted, make_prompts, quick):
    check = completeness(planted, circuit, make_prompts(8, 5), limits=quick)
    assert check.verdict == "pass" and check.value < 0.1
    assert check.details["worst"] < 0.3 and min(check.control) > check.value


def test_the_whole_model_is_complete(circuit, planted, make_prompts, quick):
    check = completeness(planted, circuit.with_nodes(all_nodes(planted.widths)), make_prompts(4, 5), limits=quick)
    assert check.value == 0 == check.details["worst"]


def test_one_of_two_ways_is_incomplete(planted, make_circuit, make_prompts, quick):
    # The answer is copied twice; a circuit with one of the copies loses all when that is taken out, the model little.
    with torch.no_grad():
        planted.layers[0].attn_v.weight[1] = planted.layers[0].attn_v.weight[0]
        planted.layers[0].attn_out.weight[3, 1] = 1.0
    check = completeness(planted, make_circuit(planted), make_prompts(8, 5), limits=replace(quick, incomplete=0.05))
    assert check.verdict == "flag" and "other ways" in check.reason
    assert check.details["location_max"] == pytest.approx(1, abs=0.25)


def test_without_anything_to_compare_it_is_flagged(circuit, planted, make_prompts, quick):
    batch = make_prompts(4, 5)
    mute = type(batch)(**{**vars(batch), "other": batch.answer})
    check = completeness(planted, circuit, mute, limits=quick)
    assert check.verdict == "flag" and "nothing to complete" in check.reason


def test_locations_of_a_set(choose, planted, planted_names):
    parts = locations_of(choose(planted, planted_names))
    assert [sum(int(mask.sum()) for mask in part.values()) for part in parts] == [3, 1, 1, 1, 1]
    assert len(locations_of(choose(planted, ()))) == 1

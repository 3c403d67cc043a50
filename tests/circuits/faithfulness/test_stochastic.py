"""Stochastic restoration: the planted circuit stands it, one whose ablated nodes cancel does not."""

from dataclasses import replace

import pytest

from distill.circuits.faithfulness.stochastic import stochastic
from distill.circuits.faithfulness.sufficiency import sufficiency
from distill.circuits.masks import all_nodes


def test_the_planted_circuit_stands_it(circuit, planted, make_prompts, quick):
    check = stochastic(planted, circuit, make_prompts(16, 5), limits=quick)
    assert check.verdict == "pass" and check.value < 0.01
    assert check.threshold == pytest.approx(2 * 0.05)
    assert check.details == stochastic(planted, circuit, make_prompts(16, 5), limits=quick).details


def test_the_ends_are_the_circuit_and_the_model(even, planted, make_prompts, quick):
    batch = make_prompts(16, 5)
    check, ends = stochastic(planted, even, batch, limits=quick), sufficiency(planted, even, batch)
    assert check.details["mean_0"] == pytest.approx(ends.value, rel=1e-4)
    assert check.details["mean_1"] == pytest.approx(ends.details["loss_full"], rel=1e-4, abs=1e-6)


def test_a_circuit_whose_ablated_nodes_cancel_is_flagged(cancelling, make_circuit, make_prompts, quick):
    circuit, batch = make_circuit(cancelling), make_prompts(16, 5)
    # Alone it does the task, and so does the model: neither says that anything is wrong.
    assert sufficiency(cancelling, circuit, batch).verdict == "pass"
    check = stochastic(cancelling, circuit, batch, limits=quick)
    assert check.verdict == "flag" and "cancel out" in check.reason
    # With one of the two back the answer is turned round, which has a chance of 2 * 1/2 * 1/2 at p = 1/2.
    assert check.details["mean_0.5"] > 1 > check.details["mean_0"]
    assert check.details["max_0.5"] > 5


def test_a_circuit_that_has_both_of_them_passes(cancelling, make_circuit, make_prompts, planted_names, quick):
    whole = make_circuit(cancelling, (*planted_names, "0.attn.v.1", "0.attn.v.2"))
    assert stochastic(cancelling, whole, make_prompts(16, 5), limits=quick).verdict == "pass"


def test_with_nothing_to_restore_every_draw_is_the_model(planted, circuit, make_prompts, quick):
    whole = circuit.with_nodes(all_nodes(planted.widths))
    limits = replace(quick, shares=(0.0, 0.5, 1.0), draw_pairs=4)
    check = stochastic(planted, whole, make_prompts(4, 5), limits=limits)
    assert check.details["mean_0"] == check.details["max_0.5"] == check.details["mean_1"]


def test_all_prompts_get_their_turn(planted, circuit, make_prompts, quick):
    # Nothing is restored, so that the draws differ in their prompts alone: eight draws of two pairs are all sixteen.
    whole, limits = circuit.with_nodes(all_nodes(planted.widths)), replace(quick, draws=8, draw_pairs=2)
    details = stochastic(planted, whole, make_prompts(16, 5), limits=limits).details
    assert details["mean_0.5"] == pytest.approx(details["mean_1"], rel=1e-4)
    assert details["max_0.5"] > details["max_1"]

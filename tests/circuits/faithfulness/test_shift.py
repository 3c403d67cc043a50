"""Off distribution: agreement with the model, not with the label."""

from dataclasses import replace

import pytest

from distill.circuits.faithfulness.shift import shift
from distill.circuits.masks import all_nodes


def test_the_planted_circuit_agrees_on_longer_prompts(circuit, planted, make_prompts):
    check = shift(planted, circuit, make_prompts(16, 7, 14))
    assert check.verdict == "pass" and check.value == 1
    assert check.p == pytest.approx(0.9**16)


def test_agreement_is_with_the_model_where_both_are_wrong(circuit, planted, make_prompts):
    batch = make_prompts(16, 7)
    turned = replace(batch, answer=batch.other, other=batch.answer)
    check = shift(planted, circuit, turned)
    assert check.value == 1 and check.details["loss_full"] > 1 and check.details["loss_circuit"] > 1


def test_a_circuit_that_guesses_is_flagged(circuit, planted, make_prompts, choose):
    check = shift(planted, circuit.with_nodes(choose(planted, ())), make_prompts(16, 7))
    # Without nodes the answer is the same for both members of a pair, of which the model gets both right.
    assert check.value == pytest.approx(0.5) and check.verdict == "flag" and check.p == pytest.approx(1)


def test_the_whole_model_agrees_with_itself(circuit, planted, make_prompts):
    check = shift(planted, circuit.with_nodes(all_nodes(planted.widths)), make_prompts(4, 7))
    assert check.value == check.details["agreement_vocabulary"] == 1 and check.details["kl_answers_max"] == 0

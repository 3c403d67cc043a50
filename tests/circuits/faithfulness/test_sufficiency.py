"""Sufficiency: KL by hand; the planted circuit passes, lucky, calibrated and all too able ones are flagged."""

import math
from dataclasses import replace

import pytest
import torch

from distill.circuits.answers import Calibration
from distill.circuits.circuit import CircuitMismatchError
from distill.circuits.faithfulness import Limits
from distill.circuits.faithfulness.sufficiency import kl, loss_empty, sufficiency
from distill.circuits.masks import all_nodes


def test_kl_by_hand():
    half, three_to_one = torch.zeros(1, 2), torch.tensor([[math.log(3), 0.0]])
    assert float(kl(half, three_to_one)) == pytest.approx(0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25))
    assert float(kl(three_to_one, half)) == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert float(kl(half, half)) == 0


def test_the_planted_circuit_passes(circuit, planted, make_prompts):
    check = sufficiency(planted, circuit, make_prompts(16, 5))
    assert check.verdict == "pass" and check.value < 0.01 and check.n == 32
    assert check.details["agreement_answers"] == 1
    assert check.details["loss_low"] <= check.value <= check.details["loss_high"] <= check.details["loss_max"]


def test_the_whole_model_as_a_circuit_is_the_model(circuit, planted, make_prompts):
    check = sufficiency(planted, circuit.with_nodes(all_nodes(planted.widths)), make_prompts(16, 5))
    assert check.value == check.details["loss_full"]
    assert check.details["kl_vocabulary_max"] == 0 == check.details["kl_answers_max"]
    assert check.details["agreement_vocabulary"] == 1


def test_a_target_met_only_by_calibration_is_flagged(circuit, planted, make_prompts):
    with torch.no_grad():
        planted.unembed.weight *= 0.02
    weak = replace(circuit, model=planted.fingerprint(), calibration=Calibration(scale=50.0))
    check = sufficiency(planted, weak, make_prompts(16, 5))
    assert check.verdict == "flag" and "only after calibration" in check.reason
    assert check.details["loss_calibrated"] < 0.15 < check.value


def test_a_circuit_that_cannot_do_the_task_is_flagged(circuit, planted, planted_means, make_prompts, choose):
    batch = make_prompts(16, 5)
    empty = circuit.with_nodes(choose(planted, ()))
    check = sufficiency(planted, empty, batch)
    assert check.verdict == "flag" and "misses the target" in check.reason
    assert check.value == pytest.approx(loss_empty(planted, planted_means, batch))


def test_doing_better_than_the_model_is_flagged(circuit, planted, make_prompts):
    # The model errs where one more channel, which the circuit leaves out, speaks against the answer.
    with torch.no_grad():
        planted.layers[0].attn_out.weight[0, 0] = 1.0
        planted.unembed.weight[5, 0], planted.unembed.weight[6, 0] = -6.0, 6.0
    able = replace(circuit, model=planted.fingerprint())
    check = sufficiency(planted, able, make_prompts(16, 5))
    assert check.details["loss_full"] > 0.15 > check.value
    assert check.verdict == "flag" and "does better" in check.reason


def test_a_tail_of_disagreement_is_flagged(circuit, planted, make_prompts):
    check = sufficiency(planted, circuit, make_prompts(16, 5), limits=Limits(tail_ratio=0.0, tail_floor=0.0))
    assert check.verdict == "flag" and "unlike the model" in check.reason


def test_another_model_is_refused(circuit, make_planted, make_prompts):
    with pytest.raises(CircuitMismatchError):
        sufficiency(make_planted(1), circuit, make_prompts(2, 0))

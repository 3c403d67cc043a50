"""Sufficiency: KL and percentiles by hand; the planted circuit passes, lucky and calibrated ones are flagged."""

import math
from dataclasses import replace

import pytest
import torch

from distill.circuits.answers import Calibration
from distill.circuits.circuit import Circuit, CircuitMismatchError
from distill.circuits.faithfulness.sufficiency import kl, loss_empty, spread_of, sufficiency
from distill.circuits.masks import all_nodes


@pytest.fixture
def circuit(planted, planted_means, choose):
    return Circuit(
        model=planted.fingerprint(), model_name="planted", task="opener", nodes=choose(planted), scores={},
        means=planted_means, calibration=Calibration(), losses={}, target=0.15,
    )  # fmt: skip


def test_kl_by_hand():
    half, three_to_one = torch.zeros(1, 2), torch.tensor([[math.log(3), 0.0]])
    assert float(kl(half, three_to_one)) == pytest.approx(0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25))
    assert float(kl(three_to_one, half)) == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert float(kl(half, half)) == 0


def test_spread_by_hand():
    found = spread_of("x", torch.arange(101.0))
    assert found == pytest.approx({"x_mean": 50, "x_median": 50, "x_iqr": 50, "x_p95": 95, "x_p99": 99})


def test_the_planted_circuit_passes(circuit, planted, make_prompts):
    check = sufficiency(planted, circuit, make_prompts(16, 5))
    assert check.verdict == "pass" and check.value < 0.01 and check.n == 32
    assert check.details["agreement_answers"] == 1


def test_the_whole_model_as_a_circuit_is_the_model(circuit, planted, make_prompts):
    check = sufficiency(planted, circuit.with_nodes(all_nodes(planted.widths)), make_prompts(16, 5))
    assert check.value == check.details["loss_full"]
    assert check.details["kl_vocabulary_p99"] == 0 == check.details["kl_answers_p95"]
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


def test_a_tail_of_disagreement_is_flagged(circuit, planted, make_prompts):
    check = sufficiency(planted, circuit, make_prompts(16, 5), tail_ratio=0.0, tail_floor=0.0)
    assert check.verdict == "flag" and "unlike the model" in check.reason


def test_another_model_is_refused(circuit, make_planted, make_prompts):
    with pytest.raises(CircuitMismatchError):
        sufficiency(make_planted(1), circuit, make_prompts(2, 0))

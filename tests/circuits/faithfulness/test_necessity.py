"""Necessity: the planted circuit is needed, idle nodes are not; what a circuit costs other tasks counts against it."""

import math

import pytest
import torch

from distill.circuits.circuit import CircuitMismatchError
from distill.circuits.faithfulness.necessity import corpus_loss, necessity


def test_the_planted_circuit_is_necessary(circuit, planted, make_prompts):
    check = necessity(planted, circuit, make_prompts(16, 5), sets=20)
    assert check.verdict == "pass" and check.value > 0.5 > check.threshold
    assert len(check.control) == 20 and check.n == 32 and check.seed == 0
    assert check.p == pytest.approx(1 / 21)
    assert check.control == necessity(planted, circuit, make_prompts(16, 5), sets=20).control
    assert check.details["share_of_random_below"] == 1


def test_idle_nodes_are_an_artefact(circuit, planted, make_prompts, choose):
    idle = circuit.with_nodes(choose(planted, ("0.mlp.post_act.1",)))
    check = necessity(planted, idle, make_prompts(16, 5), sets=5, seed=1)
    assert check.value < 0.01 and check.verdict == "artefact" and "nothing is lost" in check.reason
    assert check.details["loss_full"] < 0.01 and check.details["scale"] >= 0


def test_what_random_nodes_do_as_well_is_flagged(circuit, planted, make_prompts, choose):
    # All values but the last one: whatever is drawn beside the circuit's nodes holds the one that carries the answer.
    most = circuit.with_nodes(choose(planted, tuple(f"0.attn.v.{c}" for c in range(7))))
    check = necessity(planted, most, make_prompts(16, 5), sets=10)
    assert check.value > 0.5
    assert check.verdict == "flag" and "random nodes are needed as much" in check.reason


def test_damage_to_other_tasks_is_flagged(circuit, planted, make_prompts, make_windows, quick):
    batch = make_prompts(16, 5)
    same = necessity(planted, circuit, batch, others={"twin": batch}, corpus=make_windows(3), limits=quick)
    assert same.verdict == "flag" and "other tasks" in same.reason
    assert same.details["damage_other_twin"] == pytest.approx(same.details["damage_task"])
    assert same.details["p_specific"] > 0.4
    # A task that nobody can do costs nothing: right and wrong answer are the same.
    mute = batch.select(slice(None))
    mute = type(mute)(**{**vars(mute), "other": mute.answer})
    other = necessity(planted, circuit, batch, others={"mute": mute}, limits=quick)
    assert other.verdict == "pass" and other.details["damage_other_mute"] == pytest.approx(0)
    assert other.details["p_specific"] < 0.01


def test_the_loss_on_text_is_that_of_the_logits(planted, make_windows):
    windows = make_windows(3)[:4]
    with torch.no_grad():
        logits = planted.run(windows[:, :-1]).log_softmax(-1)
    by_hand = -logits.gather(-1, windows[:, 1:, None]).mean()
    assert corpus_loss(planted, windows, None) == pytest.approx(float(by_hand), rel=1e-5)


def test_the_refitted_loss_never_exceeds_chance(circuit, planted, make_prompts):
    check = necessity(planted, circuit, make_prompts(16, 5), sets=2)
    assert min(check.value, *check.control) >= 0 and max(check.value, *check.control) <= math.log(2) + 1e-9
    assert check.details["scale"] >= 0 and check.reason.endswith("no other task was there to compare with")


def test_bad_input_is_refused(circuit, planted, make_planted, make_prompts):
    with pytest.raises(ValueError, match="sets: got 0; allowed are 1 and more"):
        necessity(planted, circuit, make_prompts(2, 0), sets=0)
    with pytest.raises(CircuitMismatchError):
        necessity(make_planted(1), circuit, make_prompts(2, 0))

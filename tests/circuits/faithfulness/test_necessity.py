"""Necessity: matched random sets by count and activity; the planted circuit is needed, idle nodes are not."""

import math

import pytest
import torch

from distill.circuits.ablation import Means
from distill.circuits.answers import Calibration
from distill.circuits.circuit import Circuit, CircuitMismatchError
from distill.circuits.faithfulness.necessity import activity_bins, loss_without, necessity, random_nodes


@pytest.fixture
def circuit(planted, planted_means, choose):
    return Circuit(
        model=planted.fingerprint(), model_name="planted", task="opener", nodes=choose(planted), scores={},
        means=planted_means, calibration=Calibration(), losses={}, target=0.15,
    )  # fmt: skip


def test_bins_by_hand():
    bins = activity_bins(torch.tensor([0.3, 0.1, 0.2, 0.9, 0.5]), 2)
    assert [part.tolist() for part in bins] == [[1, 2, 0], [4, 3]]
    assert len(activity_bins(torch.ones(3), 10)) == 3


def test_random_sets_match_in_count_and_activity_and_avoid_the_circuit():
    activity = torch.arange(40.0)
    means = Means(values={}, magnitude={"0.attn.v": activity}, model="m", data="d", tokens=1)
    nodes = {"0.attn.v": torch.zeros(40, dtype=torch.bool)}
    nodes["0.attn.v"][[0, 1, 2, 39]] = True
    seen = torch.zeros(40, dtype=torch.bool)
    for seed in range(20):
        drawn = random_nodes(nodes, means, torch.Generator().manual_seed(seed), bins=4)["0.attn.v"]
        assert [int(drawn[part].sum()) for part in activity_bins(activity, 4)] == [3, 0, 0, 1]
        assert not bool((drawn & nodes["0.attn.v"]).any())
        seen |= drawn
    assert int(seen.sum()) > 12


def test_a_bin_with_too_few_others_is_filled_from_the_circuit():
    means = Means(values={}, magnitude={"0.attn.v": torch.ones(4)}, model="m", data="d", tokens=1)
    nodes = {"0.attn.v": torch.tensor([True, True, True, False])}
    drawn = random_nodes(nodes, means, torch.Generator().manual_seed(0), bins=1)["0.attn.v"]
    assert int(drawn.sum()) == 3 and bool(drawn[3])


def test_the_planted_circuit_is_necessary(circuit, planted, make_prompts):
    check = necessity(planted, circuit, make_prompts(16, 5), sets=10)
    assert check.verdict == "pass" and check.value > 0.5 > check.threshold
    assert len(check.control) == 10 and check.n == 32 and check.seed == 0
    assert check.control == necessity(planted, circuit, make_prompts(16, 5), sets=10).control
    assert check.details["share_of_random_below"] == 1


def test_idle_nodes_are_flagged(circuit, planted, make_prompts, choose):
    idle = circuit.with_nodes(choose(planted, ("0.mlp.post_act.1",)))
    check = necessity(planted, idle, make_prompts(16, 5), sets=5, percentile=100.0, seed=1)
    assert check.value < 0.01
    full, scale = loss_without(planted, choose(planted, ()), circuit.means, make_prompts(16, 5))
    assert full < 0.01 and scale >= 0


def test_a_useless_circuit_is_flagged(circuit, planted, make_prompts, choose):
    # The draws avoid the chosen nodes, so that at this location they hit the one that carries the answer now and then.
    idle = circuit.with_nodes(choose(planted, ("0.attn.v.1", "0.attn.v.2", "0.attn.v.3", "0.attn.v.4")))
    check = necessity(planted, idle, make_prompts(16, 5), sets=20, percentile=100.0)
    assert check.value < 0.05
    assert check.verdict == "flag"


def test_the_refitted_loss_never_exceeds_chance(circuit, planted, make_prompts, choose):
    loss, scale = loss_without(planted, circuit.nodes, circuit.means, make_prompts(16, 5))
    assert 0 <= loss <= math.log(2) + 1e-9 and scale >= 0


def test_bad_input_is_refused(circuit, planted, make_planted, make_prompts):
    with pytest.raises(ValueError, match="sets: got 0; allowed are 1 and more"):
        necessity(planted, circuit, make_prompts(2, 0), sets=0)
    with pytest.raises(CircuitMismatchError):
        necessity(make_planted(1), circuit, make_prompts(2, 0))

"""Ablation matrix: the planted circuit works whatever the rest is; one that lives on a mean or on a norm does not."""

import math
from dataclasses import replace

import pytest
import torch

from distill.circuits.answers import answer_difference, chain, frozen_norms, two_way_loss
from distill.circuits.faithfulness.ablations import ablations
from distill.circuits.faithfulness.statistics import rank_p
from distill.circuits.faithfulness.sufficiency import sufficiency
from distill.circuits.masks import all_nodes


def test_the_planted_circuit_stands_every_ablation(circuit, planted, make_prompts, make_windows, quick):
    check = ablations(planted, circuit, make_prompts(16, 5), make_windows(3), limits=quick)
    assert check.verdict == "pass" and check.value < 0.01
    cells = {f"{value}_{norms}" for value in ("mean", "task", "resample", "zero") for norms in ("free", "frozen")}
    assert cells <= set(check.details) and max(check.details[cell] for cell in cells) < 0.01
    assert check.threshold == pytest.approx(0.3) and len(check.control) == 8 and check.p == pytest.approx(1 / 9)


def test_cells_are_what_they_are_called(even, planted, make_prompts, make_windows, quick):
    batch = make_prompts(8, 5)
    check = ablations(planted, even, batch, make_windows(3), limits=quick)
    assert check.details["mean_free"] == pytest.approx(sufficiency(planted, even, batch).value, rel=1e-4)
    with torch.no_grad():
        held = chain(even.tap(planted), frozen_norms(planted, batch))
        by_hand = float(two_way_loss(answer_difference(planted, batch, held)))
    assert check.details["mean_frozen"] == pytest.approx(by_hand, rel=1e-4)
    assert check.value == max(check.details["resample_free"], check.details["mean_frozen"])
    # Read against random circuits as these are: at the best scale, which is never worse, nor worse than chance.
    refitted = check.details["refitted"]
    assert refitted <= min(check.value, math.log(2)) + 1e-9
    assert check.p == rank_p(refitted, check.control, high=False)


def test_the_whole_model_does_not_depend_on_ablation_values(circuit, planted, make_prompts, make_windows, quick):
    whole = circuit.with_nodes(all_nodes(planted.widths))
    check = ablations(planted, whole, make_prompts(8, 5), make_windows(3), limits=quick)
    losses = [check.details[cell] for cell in ("mean_free", "resample_free", "zero_frozen", "task_frozen")]
    assert max(losses) - min(losses) < 1e-5


def test_a_circuit_that_lives_on_the_norm_is_found_out(planted, make_circuit, make_prompts, make_windows, quick):
    # The model writes much where nobody reads it; pruned, the short stream is blown up by the last norm.
    with torch.no_grad():
        planted.layers[0].mlp_out.bias[8] = 1000.0
        planted.unembed.weight *= 8
    circuit = make_circuit(planted)
    values = {location: torch.zeros_like(value) for location, value in circuit.means.values.items()}
    circuit = replace(circuit, means=replace(circuit.means, values=values))
    check = ablations(planted, circuit, make_prompts(16, 5), make_windows(3), limits=quick)
    assert check.details["mean_frozen"] > 0.45 and check.details["mean_free"] < 0.01
    assert check.value >= check.details["mean_frozen"]


def test_a_circuit_no_better_than_chance_is_flagged(circuit, planted, make_prompts, make_windows, choose, quick):
    idle = circuit.with_nodes(choose(planted, ("0.mlp.post_act.1", "0.attn.v.1")))
    check = ablations(planted, idle, make_prompts(16, 5), make_windows(3), limits=quick)
    assert check.verdict == "flag" and "no better than random circuits" in check.reason

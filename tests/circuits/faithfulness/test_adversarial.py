"""Adversarial restoration: projected ascent by hand, and a circuit that stands what random ones do not."""

from dataclasses import replace

import pytest
import torch

from distill.circuits.answers import two_way_loss
from distill.circuits.faithfulness import Runs
from distill.circuits.faithfulness.adversarial import adversarial, ascend
from distill.circuits.faithfulness.runs import PartTap
from distill.circuits.masks import all_nodes


def test_the_planted_circuit_stands_it(circuit, planted, make_prompts, quick):
    check = adversarial(planted, circuit, make_prompts(8, 6), make_prompts(8, 5), limits=quick)
    assert check.verdict == "pass" and check.value < 0.1 < check.threshold
    assert len(check.control) == 4 and check.p == pytest.approx(1 / 5)


def test_idle_nodes_do_not(circuit, planted, make_prompts, choose, quick):
    idle = circuit.with_nodes(choose(planted, ("0.mlp.post_act.1", "0.mlp.post_act.2")))
    more = replace(quick, random_circuits=24)
    check = adversarial(planted, idle, make_prompts(8, 6), make_prompts(8, 5), limits=more)
    assert check.verdict == "flag" and "no better than random circuits" in check.reason


def test_the_ascent_finds_what_one_value_can_do(cancelling, make_circuit, make_prompts):
    circuit = make_circuit(cancelling)
    runs, batch = Runs(cancelling, circuit), make_prompts(8, 5)
    generator = torch.Generator().manual_seed(0)
    masks = ascend(runs, circuit.nodes, batch, steps=20, step=0.1, generator=generator)
    # The value that speaks against the answer is brought back, the one that makes up for it is not.
    assert float(masks["0.attn.v"][1]) == 1 and float(masks["0.attn.v"][2]) == 0
    loss = two_way_loss(runs.difference(batch, runs.logits(batch, PartTap(masks, runs.means))))
    assert float(loss) > 5
    for location, mask in masks.items():
        assert float(mask.min()) >= 0 and float(mask.max()) <= 1
        assert bool((mask[circuit.nodes[location]] == 1).all())


def test_with_nothing_to_restore_it_is_not_asked(circuit, planted, make_prompts, quick):
    whole, batch = circuit.with_nodes(all_nodes(planted.widths)), make_prompts(4, 5)
    check = adversarial(planted, whole, batch, batch, limits=quick)
    assert check.verdict == "skipped" and "no node was pruned" in check.reason

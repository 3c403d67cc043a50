"""Stability: overlap of seeds and transfer by hand; low overlap alone is no failure."""

from dataclasses import replace

import pytest

from distill.circuits.faithfulness.stability import stability
from distill.circuits.prune import PruneConfig, prune_batches


def test_seeds_that_agree(circuit, planted, make_prompts):
    check = stability(planted, circuit, [circuit], [make_prompts(4, 1), make_prompts(4, 2)])
    assert check.verdict == "pass" and check.value == 1 and check.details["jaccard_edges_mean"] == 1
    assert check.details["transfer_max"] < 0.01 and check.n == 16


def test_overlap_by_hand(circuit, planted, make_circuit, make_prompts, planted_names):
    larger = make_circuit(planted, (*planted_names, "0.attn.v.1", "0.attn.v.2", "0.attn.v.3"))
    check = stability(planted, circuit, [larger], [make_prompts(4, 1), make_prompts(4, 2)])
    assert check.value == pytest.approx(7 / 10)
    assert (check.details["nodes_min"], check.details["nodes_median"], check.details["nodes_max"]) == (7, 8.5, 10)


def test_low_overlap_alone_is_no_failure(circuit, planted, make_circuit, make_prompts, choose):
    batches = [make_prompts(4, 1), make_prompts(4, 2)]
    apart = make_circuit(planted, ("0.mlp.post_act.1",))
    failing = stability(planted, circuit, [apart], batches)
    assert failing.value == 0 and failing.verdict == "flag" and "fits its own prompts" in failing.reason
    # The same low overlap, and a target that both meet.
    lax = replace(circuit, target=5.0)
    assert stability(planted, lax, [apart], batches).verdict == "pass"


def test_without_other_seeds_it_is_skipped(circuit, planted, make_prompts):
    check = stability(planted, circuit, [], [make_prompts(4, 1)])
    assert check.verdict == "skipped" and not check.flagged


def test_other_seeds_find_the_planted_circuit_again(planted, planted_means, make_prompts):
    config = PruneConfig(steps=40, pairs=8)
    first, second = (
        prune_batches(planted, "opener", make_prompts(32, 1), make_prompts(16, 2), planted_means,
                      replace(config, seed=seed)) for seed in (0, 1)
    )  # fmt: skip
    check = stability(planted, first, [second], [make_prompts(8, 5), make_prompts(8, 6)])
    assert check.verdict == "pass" and check.value > 0.5 and check.details["transfer_max"] < 0.15

"""Controls: ratios by hand, redrawn weights, and pruning for a rule that the model does not follow."""

from dataclasses import replace

import pytest
import torch

from distill.circuits.ablation import node_means
from distill.circuits.faithfulness.controls import Control, config_of, controls, edges_of, redrawn
from distill.circuits.faithfulness.sufficiency import sufficiency
from distill.circuits.prune import PruneConfig, prune_batches
from distill.circuits.selection import TargetError


def sizes(**edges: int | None) -> dict[str, Control]:
    return {name: Control(edges=count, real=4) for name, count in edges.items()}


def test_ratios_by_hand(circuit, planted):
    assert edges_of(planted, circuit) == 4
    far = controls(planted, circuit, sizes(a=40, b=None), n=8)
    assert far.verdict == "pass" and far.value == 10 and far.control == (40.0,)
    near = controls(planted, circuit, sizes(a=40, b=12), n=8)
    assert near.verdict == "flag" and near.value == 3 and "b takes 12 edges, the task 4" in near.reason
    same = controls(planted, circuit, sizes(a=4, b=None), n=8)
    assert same.verdict == "artefact" and same.value == 1 and same.to_json()["details"]["edges_b"] is None
    none = controls(planted, circuit, sizes(a=None, b=None), n=8)
    assert none.verdict == "pass" and "out of reach for a and for b" in none.reason
    assert none.to_json()["value"] is None
    assert controls(planted, circuit, {}, n=8).verdict == "skipped"


def test_redrawn_weights_keep_zeros_and_values(planted):
    noise = redrawn(planted, 0)
    moved = 0
    for (name, old), (_, new) in zip(planted.named_parameters(), noise.named_parameters(), strict=True):
        assert torch.equal(old == 0, new == 0), name
        assert torch.equal(old.flatten().sort().values, new.flatten().sort().values), name
        moved += not torch.equal(old, new)
    assert moved >= 6
    assert torch.equal(noise.final_norm.weight, planted.final_norm.weight)
    assert redrawn(planted, 0).fingerprint() == noise.fingerprint() != redrawn(planted, 1).fingerprint()


def test_settings_come_from_the_circuit(circuit):
    known = replace(circuit, target=0.2, provenance={"config": {"steps": 7, "goal": 0.3, "relative": True, "gone": 1}})
    config = config_of(known, seed=5)
    assert (config.steps, config.goal, config.relative, config.target, config.seed) == (7, 0.2, False, 0.2, 5)
    assert config_of(circuit) == PruneConfig(target=0.15)


@pytest.fixture
def nonsense(make_prompts):
    """The same contrast as the task's, answered by x and y."""

    def make(pairs: int, seed: int):
        batch = make_prompts(pairs, seed)
        return replace(batch, answer=2 + batch.labels, other=3 - batch.labels)

    return make


@pytest.fixture
def opinionated(planted, nonsense):
    """The planted model, where all writes but the largest speak for the nonsense rule, and that one overrules them."""
    batch = nonsense(32, 1)
    with torch.no_grad():
        stream = planted.run(batch.tokens, stop="final_resid")[torch.arange(64), batch.last][:, 4:]
        write = (stream * batch.orientation[:, None]).mean(0)
        read, largest = write.sign(), int(write.abs().argmax())
        read[largest] *= -1.2 * (write.abs().sum() / write[largest].abs() - 1)
        asking = planted.embed_tokens.weight[4, 4:]
        read -= (read @ asking) / (asking @ asking) * asking
        planted.unembed.weight[2, 4:], planted.unembed.weight[3, 4:] = 10 * read, -10 * read
    return planted


def test_a_circuit_pruned_for_a_nonsense_rule_is_flagged(opinionated, nonsense, make_windows):
    config = PruneConfig(target=0.5, headroom=0.1, pairs=8, margin=0.0)
    means = node_means(opinionated, make_windows())
    circuits = [
        prune_batches(opinionated, "nonsense", nonsense(32, 1), nonsense(16, 2), means, replace(config, seed=seed))
        for seed in (0, 1)
    ]
    found = sufficiency(opinionated, circuits[0], nonsense(16, 5))
    assert found.details["loss_full"] > 5 > 0.5 > found.value  # the model does not follow the rule, the circuit does
    assert found.verdict == "flag" and "does better" in found.reason
    again = Control(edges=edges_of(opinionated, circuits[1]), real=edges_of(opinionated, circuits[0]))
    check = controls(opinionated, circuits[0], {"another nonsense rule": again}, n=32)
    assert check.verdict == "artefact" and check.value < 2


def test_a_rule_that_the_model_cannot_follow_is_out_of_reach(planted, circuit, nonsense, make_windows):
    # No node speaks for x or for y, so there is nothing to be found, whatever is kept.
    with pytest.raises(TargetError):
        prune_batches(planted, "nonsense", nonsense(16, 1), nonsense(8, 2), circuit.means,
                      PruneConfig(target=0.5, steps=5, pairs=8))  # fmt: skip
    assert controls(planted, circuit, sizes(nonsense=None), n=16).verdict == "pass"

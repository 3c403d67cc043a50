"""Same role: correlations, shifts and attention distances by hand; a head that has gone uniform is found."""

import math

import pytest
import torch

from distill.circuits.faithfulness import Limits, Runs
from distill.circuits.faithfulness.heads import (
    compare_heads,
    jensen_shannon,
    pattern_distance,
    query_weights,
    uniform_distance,
)
from distill.circuits.faithfulness.role import compare_nodes, role
from distill.circuits.masks import all_nodes


def test_nodes_by_hand():
    model = torch.tensor([[1.0, 1.0, 2.0, 5.0, 1.0], [3.0, 2.0, 2.0, 5.0, 2.0], [5.0, 3.0, 2.0, 5.0, 3.0]])
    circuit = torch.tensor([[2.0, 3.0, 2.1, 8.0, -3.0], [4.0, 2.0, 2.1, 8.0, -2.0], [6.0, 1.0, 2.1, 8.0, -1.0]])
    # Moved by 1; turned round; constant and moved by 1/10 or 3 standard deviations; moving along but of another sign.
    roles = compare_nodes(circuit, model, torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0]), Limits())
    assert roles.correlation[:2].tolist() == pytest.approx([1.0, -1.0])
    assert roles.unexplained[:2].tolist() == pytest.approx([3 / 8, 8 / 2])
    assert roles.shift.tolist() == pytest.approx([1.0, 0.0, 0.1, 3.0, 4.0], abs=1e-6)
    assert roles.constant.tolist() == [False, False, True, True, False]
    assert roles.changed.tolist() == [False, True, False, True, True]
    assert bool(roles.correlation[2:4].isnan().all())


def test_a_node_that_stands_still_in_the_circuit_alone_is_changed():
    model, circuit = torch.tensor([[1.0], [2.0]]), torch.tensor([[1.5], [1.5]])
    roles = compare_nodes(circuit, model, torch.ones(1), Limits())
    assert roles.changed.tolist() == [True] and roles.correlation.tolist() == [0.0]


def test_distances_by_hand():
    one, other, even = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), torch.tensor([0.5, 0.5])
    assert float(jensen_shannon(one, other)) == pytest.approx(math.sqrt(math.log(2)))
    assert float(jensen_shannon(one, one)) == 0
    by_hand = 0.5 * math.log(1 / 0.75) + 0.5 * (0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25))
    assert float(jensen_shannon(one, even)) == pytest.approx(math.sqrt(by_hand))


def test_patterns_are_compared_where_there_is_weight_and_the_sink_is_a_key():
    # One prompt, one head, two tokens: in one run the sink takes all of the second query, in the other nothing.
    sink, key = torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]]]), torch.tensor([[[[1.0, 0.0], [0.0, 1.0]]]])
    assert float(pattern_distance(sink, key, torch.tensor([[1.0, 1.0]]))) == pytest.approx(math.sqrt(math.log(2)) / 2)
    assert float(pattern_distance(sink, key, torch.tensor([[1.0, 0.0]]))) == 0
    assert math.isnan(float(pattern_distance(sink, key, torch.zeros(1, 2))))


def test_uniform_attention_has_no_distance_and_what_the_sink_takes_has_no_weight():
    even = torch.tril(torch.ones(4, 4)) / torch.arange(1, 5)[:, None]
    sharp = torch.eye(4)
    patterns = torch.stack([even, 0.1 * even, sharp])[None]
    found = uniform_distance(patterns, torch.ones(1, 4))
    expected = [float(jensen_shannon(sharp[q], even[q])) for q in (2, 3)]
    assert found.tolist() == pytest.approx([0.0, 0.0, sum(expected) / 2], abs=1e-6)
    # Of a query that sees two keys only nothing is said.
    assert bool(uniform_distance(patterns, torch.tensor([[1.0, 1.0, 0.0, 0.0]])).isnan().all())


def test_the_answer_rests_on_what_attention_writes_at_the_last_token(circuit, planted, make_prompts):
    batch = make_prompts(4, 5)
    (weights,) = query_weights(Runs(planted, circuit), batch)
    rows = torch.arange(len(batch))
    assert bool((weights[rows, batch.last] > 0).all())
    assert float(weights.sum() - weights[rows, batch.last].sum()) == pytest.approx(0, abs=1e-5)


def test_the_planted_circuit_keeps_every_role(circuit, planted, make_prompts, make_windows, quick):
    check = role(planted, circuit, make_prompts(16, 5), make_windows(3), limits=quick)
    assert check.verdict == "pass" and check.value == 0
    assert check.details["correlation_median"] > 0.99 and check.details["unexplained_median"] < 0.01
    assert check.details["interchange_1"] < 0.01 and check.details["head_0.0"] < 0.1


def test_the_whole_model_is_unchanged(circuit, planted, make_prompts, make_windows, quick):
    whole = circuit.with_nodes(all_nodes(planted.widths))
    check = role(planted, whole, make_prompts(8, 5), make_windows(3), limits=quick)
    assert check.verdict == "pass" and check.details["unexplained_median"] == 0 and check.details["head_0.0"] == 0


def test_a_head_gone_uniform_is_flagged(even, circuit, planted, make_prompts, make_windows, quick):
    batch = make_prompts(16, 5)
    heads = compare_heads(Runs(planted, even), batch)
    assert heads.names == ("0.0",)
    assert float(heads.uniform_circuit) == pytest.approx(0, abs=1e-3)
    assert float(heads.uniform_model) > 0.4 and float(heads.distance) > 0.4
    check = role(planted, even, batch, make_windows(3), limits=quick)
    assert check.verdict == "flag" and "head 0.0 attends evenly in it and not in the model" in check.reason


def test_a_node_of_another_role_is_flagged(planted, make_circuit, make_prompts, make_windows, quick):
    # In the model a second value turns the last write round, which the circuit leaves out.
    with torch.no_grad():
        planted.layers[0].attn_v.weight[1] = planted.layers[0].attn_v.weight[0]
        planted.layers[0].attn_out.weight[3, 1] = -3.0
    check = role(planted, make_circuit(planted), make_prompts(16, 5), make_windows(3), limits=quick)
    assert check.verdict == "flag" and check.value > 0.1 and "0.attn.resid_delta.3" in check.reason


def test_a_circuit_without_nodes_has_no_roles(circuit, planted, choose, make_prompts, make_windows, quick):
    check = role(planted, circuit.with_nodes(choose(planted, ())), make_prompts(4, 5), make_windows(3), limits=quick)
    assert check.verdict == "skipped" and "none of its 0 nodes has an effect" in check.reason

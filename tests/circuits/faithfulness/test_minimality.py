"""Minimality: nothing can go from the planted circuit, and what was added to it is found."""

import pytest
import torch

from distill.circuits.edges import induced_edge_set
from distill.circuits.faithfulness import Limits, Runs
from distill.circuits.faithfulness.minimality import minimality
from distill.circuits.faithfulness.sufficiency import sufficiency
from distill.model.transformer import Architecture, SparseTransformer


def test_nothing_can_go_from_the_planted_circuit(circuit, planted, make_prompts):
    check = minimality(planted, circuit, make_prompts(16, 5))
    assert check.verdict == "pass" and check.value == 0
    assert check.details["nodes"] == 7 and check.details["edges"] == 4
    assert check.details["node_change_median"] > 0.1


def test_idle_nodes_are_found(planted, make_circuit, make_prompts, planted_names):
    loose = make_circuit(planted, (*planted_names, "0.mlp.post_act.3", "0.attn.v.5"))
    check = minimality(planted, loose, make_prompts(16, 5))
    assert check.verdict == "flag" and "2 of 9 nodes can go" in check.reason
    assert check.value == pytest.approx(2 / 9)


def test_changes_are_those_of_whole_runs(circuit, planted, make_prompts, choose, planted_names):
    batch = make_prompts(8, 5)
    losses = [
        sufficiency(planted, circuit.with_nodes(choose(planted, tuple(set(planted_names) - gone))), batch).value
        for gone in (set(), *({name} for name in planted_names))
    ]
    changes = sorted(loss - losses[0] for loss in losses[1:])
    check = minimality(planted, circuit, batch)
    assert check.details["node_change_median"] == pytest.approx(changes[3], rel=1e-4)
    assert check.details["node_change_max"] == pytest.approx(changes[-1], rel=1e-4)


def test_of_many_nodes_those_that_matter_least_are_tried(planted, make_circuit, make_prompts, planted_names):
    loose = make_circuit(planted, (*planted_names, "0.mlp.post_act.3", "0.attn.v.5"))
    check = minimality(planted, loose, make_prompts(8, 5), limits=Limits(single_nodes=3))
    assert check.details["nodes_tried"] == 3 and "2 of 9 nodes (3 tried)" in check.reason


def test_an_edge_without_effect_counts_where_edges_were_pruned(planted, make_circuit, make_prompts, planted_names):
    loose = make_circuit(planted, (*planted_names, "0.attn.v.5", "0.attn.act_in.6"))
    batch = make_prompts(16, 5)
    everything = induced_edge_set(planted, loose.nodes)
    assert "edges can go" not in minimality(planted, loose, batch).reason
    pruned = loose.with_edges(everything)
    check = minimality(planted, pruned, batch)
    assert check.verdict == "flag" and "edges can go" in check.reason
    assert check.details["edges_without_effect"] > 0


def test_a_dropped_edge_is_gone_from_every_run(circuit, planted, make_prompts):
    batch = make_prompts(8, 5)
    edges = induced_edge_set(planted, circuit.nodes)
    edges[("0.attn.v", "0.attn.resid_delta")] = edges[("0.attn.v", "0.attn.resid_delta")][:, :0]
    cut = circuit.with_edges(edges)
    runs = Runs(planted, cut)
    # What is left is the ablation value of the source, which prefers the same word whatever the prompt.
    prefers = runs.difference(batch, runs.ours(batch)) * batch.orientation
    assert float(prefers.max() - prefers.min()) < 1e-4 < float(runs.of(batch, circuit.with_edges(None).nodes).std())
    alone = runs.of(batch, cut.nodes).tolist()
    assert alone == pytest.approx(runs.difference(batch, runs.ours(batch)).tolist(), abs=1e-4)
    # Beside a node that is not the circuit's, all edges are there; restored, all of the model is.
    every = {location: mask | True for location, mask in cut.nodes.items()}
    assert float(runs.of(batch, every).min()) > 1
    restored = runs.difference(
        batch, runs.logits(batch, runs.restored(lambda size: (every["0.attn.v"][:1]).expand(size)))
    )
    assert restored.tolist() == pytest.approx(runs.difference(batch, runs.full(batch)).tolist(), rel=1e-4)


def test_a_part_runs_alike_as_a_module_and_under_a_tap(planted, make_circuit, make_prompts, planted_names):
    loose = make_circuit(planted, (*planted_names, "0.attn.v.5", "0.attn.act_in.6", "0.attn.resid_delta.8"))
    runs, batch = Runs(planted, loose), make_prompts(8, 5)
    part = {**loose.nodes, "0.attn.v": loose.nodes["0.attn.v"] & (torch.arange(8) > 0)}
    fewer = {matrix: index[:, 1:] for matrix, index in runs.edges.items()}
    for nodes, edges in ((part, None), (None, fewer), (None, None)):
        tapped = runs.difference(batch, runs.logits(batch, runs.tap(nodes, edges=edges)))
        assert runs.of(batch, nodes, edges=edges).tolist() == pytest.approx(tapped.tolist(), abs=1e-4)


def test_a_model_that_cannot_be_taken_apart_is_judged_under_taps(make_circuit, make_prompts):
    architecture = Architecture(vocab_size=7, context=16, n_layer=1, d_model=16, d_head=8, d_mlp=8,
                                residual_activation="relu", bigram=False)  # fmt: skip
    model = SparseTransformer.build(architecture)
    circuit = make_circuit(model, ("0.attn.act_in.0", "0.attn.v.0", "0.attn.resid_delta.0", "0.mlp.post_act.1"))
    check = minimality(model, circuit, make_prompts(4, 5))
    assert check.details["nodes_tried"] == 4 and check.details["edges_tried"] == 2


def test_a_circuit_without_nodes_is_not_asked(circuit, planted, make_prompts, choose):
    check = minimality(planted, circuit.with_nodes(choose(planted, ())), make_prompts(4, 5))
    assert check.verdict == "skipped" and "no nodes" in check.reason

"""A planted circuit is found exactly, nodes and edges, among distractors; and stands alone."""

import pytest
import torch

from distill.circuits.ablation import node_means
from distill.circuits.answers import answer_difference, two_way_loss
from distill.circuits.edges import circuit_tap, edge_total, induced_edge_set
from distill.circuits.masks import all_nodes
from distill.circuits.standalone import standalone
from distill.circuits.thinning import clean_up_edges, drop_dangling, edge_importance, node_importance, thin_out
from distill.model.sites import split_node

GOAL = 0.15


@pytest.mark.parametrize("seed", range(5))
def test_thinning_finds_it_from_the_whole_model(make_planted, make_prompts, make_windows, planted_edges, choose, seed):
    model = make_planted(seed, stray=0.1)
    means, batch = node_means(model, make_windows()), make_prompts(32, 2)
    module, widths = standalone(model, all_nodes(model.widths), means), list(model.widths.values())

    def nodes_of(kept):
        return dict(zip(model.widths, kept.split(widths), strict=True))

    def meets(nodes, edges):
        with torch.no_grad():
            return float(two_way_loss(module.difference(batch, nodes=nodes, edges=edges))) <= GOAL

    kept = thin_out(
        torch.ones(sum(widths), dtype=torch.bool),
        lambda kept: torch.cat(list(node_importance(module, batch, nodes_of(kept)).values())),
        lambda kept: meets(nodes_of(kept), None),
        runs=400,
    )
    nodes = nodes_of(kept)
    start = induced_edge_set(model, nodes)
    edges = clean_up_edges(
        start,
        lambda edges: edge_importance(module, batch, edges, nodes),
        lambda edges: meets(nodes, edges),
        runs=100,
    )
    wanted = {(split_node(source), split_node(target)) for source, target in planted_edges}
    found = {((source, int(j)), (target, int(i))) for (source, target), index in edges.items() for i, j in index.T}
    assert found == wanted
    assert {place: mask.tolist() for place, mask in nodes.items()} == {
        place: mask.tolist() for place, mask in choose(model).items()
    }
    assert edge_total(start) == 10
    same_nodes, same_edges = drop_dangling(model, nodes, edges)
    assert all(torch.equal(same_nodes[place], mask) for place, mask in nodes.items())
    assert edge_total(same_edges) == 4


def test_a_clean_up_without_runs_changes_nothing(make_planted, make_prompts, make_windows, choose):
    model = make_planted(0, stray=0.1)
    nodes = choose(model)
    module = standalone(model, nodes, node_means(model, make_windows()))
    start = induced_edge_set(model, nodes)
    left = clean_up_edges(start, lambda edges: edge_importance(module, make_prompts(4, 0), edges), bool, runs=0)
    assert {matrix: index.tolist() for matrix, index in left.items()} == {
        matrix: index.tolist() for matrix, index in start.items()
    }


@pytest.mark.parametrize("topk_fraction", [0.5, None])
def test_it_stands_alone(make_planted, make_prompts, make_windows, choose, topk_fraction):
    model = make_planted(2, topk_fraction, stray=0.1)
    means, batch, nodes = node_means(model, make_windows()), make_prompts(16, 5), choose(model)
    module = standalone(model, nodes, means)
    with torch.no_grad():
        masked = answer_difference(model, batch, circuit_tap(model, nodes, means))
        torch.testing.assert_close(module.difference(batch), masked, rtol=1e-5, atol=1e-5)
        assert float(two_way_loss(module.difference(batch))) < 0.01

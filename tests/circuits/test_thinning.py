"""Thinning out: scores against those of the masked model, the loop on a known problem, dangling nodes by hand."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distill.circuits.ablation import node_means
from distill.circuits.answers import answer_difference, two_way_loss
from distill.circuits.edges import EdgeTap, checked_edges, edge_total, induced_edge_set
from distill.circuits.masks import MaskTap, all_nodes
from distill.circuits.standalone import standalone
from distill.circuits.thinning import drop_dangling, edge_importance, node_importance, thin_out, trim_dangling
from distill.model.sites import chain, split_node
from distill.model.transformer import Architecture, SparseTransformer


@pytest.fixture
def stray(make_planted):
    """The planted model, all of its nodes at work, with weights that the task does not need."""
    model = make_planted(0, stray=0.3).double().requires_grad_(False)
    model.unembed.weight *= 0.2
    return model


def kept_part(model, names, choose, share, seed):
    generator = torch.Generator().manual_seed(seed)
    return {place: mask | (torch.rand(len(mask), generator=generator) < share) for place, mask in
            choose(model, names).items()}  # fmt: skip


def test_scores_of_nodes_are_gradients_under_the_masks_of_the_model(
    stray, make_prompts, make_windows, planted_names, choose
):
    means, batch = node_means(stray, make_windows()), make_prompts(16, 1)
    nodes = kept_part(stray, planted_names, choose, 0.5, 0)
    masks = {place: mask.double().requires_grad_() for place, mask in nodes.items()}
    loss = two_way_loss(answer_difference(stray, batch, MaskTap(masks, means)))
    loss.backward()
    found = node_importance(standalone(stray, all_nodes(stray.widths), means), batch, nodes)
    for place, mask in nodes.items():
        gradient = masks[place].grad
        assert gradient is not None
        torch.testing.assert_close(found[place], torch.where(mask, -gradient, 0).float(), rtol=1e-5, atol=1e-9)
    assert max(float(score.max()) for score in found.values()) > 0.01


def test_scores_of_edges_are_gradients_under_the_gates_of_the_model(
    stray, make_prompts, make_windows, planted_names, choose
):
    means, batch = node_means(stray, make_windows()), make_prompts(16, 1)
    nodes = kept_part(stray, planted_names, choose, 0.5, 0)
    edges = induced_edge_set(stray, nodes)
    gates = {matrix: torch.ones(index.shape[1], dtype=torch.double, requires_grad=True) for matrix, index in
             edges.items()}  # fmt: skip
    tap = chain(MaskTap(nodes, means), EdgeTap(stray, edges, means, gates))
    two_way_loss(answer_difference(stray, batch, tap)).backward()
    expected = -torch.cat([torch.zeros(len(g)) if g.grad is None else g.grad for g in gates.values()])
    found = edge_importance(standalone(stray, nodes, means), batch, edges)
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-9)
    larger = standalone(stray, all_nodes(stray.widths), means)
    torch.testing.assert_close(edge_importance(larger, batch, edges, nodes), found, rtol=1e-5, atol=1e-9)


def test_a_circuit_without_writes_has_no_importance(planted, planted_means, make_prompts, choose):
    nodes = choose(planted, ("0.attn.act_in.0", "0.attn.v.0"))
    edges = induced_edge_set(planted, nodes)
    module = standalone(planted, nodes, planted_means)
    assert edge_importance(module, make_prompts(2, 0), edges).tolist() == [0.0] * edge_total(edges) == [0.0]
    assert not any(bool(score.any()) for score in node_importance(module, make_prompts(2, 0), nodes).values())


@given(st.lists(st.integers(0, 9), min_size=1, max_size=12), st.integers(0, 40))
def test_what_is_left_meets_the_goal_and_nothing_more_can_go(costs, goal):
    cost = torch.tensor(costs, dtype=torch.float)
    full = torch.ones(len(costs), dtype=torch.bool)

    def meets(kept):
        return float(cost[~kept].sum()) <= goal

    kept = thin_out(full, lambda _: cost, meets, runs=10_000)
    assert meets(kept) and bool(full.all())
    for i in kept.nonzero()[:, 0].tolist():
        fewer = kept.clone()
        fewer[i] = False
        assert not meets(fewer), i


def test_it_stops_when_runs_or_time_are_spent():
    full, free = torch.ones(16, dtype=torch.bool), torch.zeros(16)
    calls = []

    def meets(kept):
        calls.append(int(kept.sum()))
        return True

    assert thin_out(full, lambda _: free, meets, runs=0).all() and not calls
    assert thin_out(full, lambda _: free, meets, runs=100, spent=lambda: 1.0).all() and not calls
    assert int(thin_out(full, lambda _: free, meets, runs=2).sum()) == 12 and calls == [12]
    assert not thin_out(full, lambda _: free, meets, runs=100).any()
    assert calls == [12, 12, 4, 0]  # batches of 4, 8 and 16


def test_only_what_is_there_is_scored_and_removed():
    start = torch.tensor([True, False, True, True])
    seen = []

    def score(kept):
        seen.append(kept.tolist())
        return torch.tensor([3.0, -9.0, 1.0, 2.0])

    left = thin_out(start, score, lambda kept: bool(kept[0]), runs=50)
    assert left.tolist() == [True, False, False, False]
    assert seen[0] == start.tolist()


# What is left hanging.


def small():
    """Two layers of width 4, one head of 2, nothing in any weight."""
    shape = Architecture(vocab_size=3, context=4, n_layer=2, d_model=4, n_head=2, d_head=2, d_mlp=3, bigram=False)
    model = SparseTransformer.build(shape).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.zero_()
    model.embed_tokens.weight[:, :2] = 1.0
    model.unembed.weight[:, 3] = 1.0
    return model


def names(nodes):
    return {f"{place}.{int(c)}" for place, mask in nodes.items() for c in mask.nonzero()[:, 0]}


def written_out(model, kept, pairs):
    nodes = {place: torch.zeros(width, dtype=torch.bool) for place, width in model.widths.items()}
    for name in kept:
        place, channel = split_node(name)
        nodes[place][channel] = True
    edges: dict = {}
    for source, target in pairs:
        (a, i), (b, j) = split_node(source), split_node(target)
        edges.setdefault((a, b), []).append((j, i))
    return nodes, checked_edges({matrix: torch.tensor(some).T for matrix, some in edges.items()}, nodes)


def dangling(model, kept, pairs):
    left, edges = drop_dangling(model, *written_out(model, kept, pairs))
    return names(left), edge_total(edges)


PATH = [("0.mlp.act_in.0", "0.mlp.post_act.1"), ("0.mlp.post_act.1", "0.mlp.resid_delta.3")]
ON_PATH = {"0.mlp.act_in.0", "0.mlp.post_act.1", "0.mlp.resid_delta.3"}


def test_a_path_from_the_embedding_to_the_logits_stays():
    assert dangling(small(), ON_PATH, PATH) == (ON_PATH, 2)


@pytest.mark.parametrize(
    ("extra", "edges"),
    [
        ({"0.mlp.act_in.1"}, []),  # nothing takes it up
        ({"0.mlp.post_act.0"}, [("0.mlp.post_act.0", "0.mlp.resid_delta.3")]),  # nothing reaches it
        ({"0.mlp.resid_delta.2"}, [("0.mlp.post_act.1", "0.mlp.resid_delta.2")]),  # neither unembedded nor read again
        ({"0.mlp.act_in.2", "0.mlp.post_act.0"},  # a read of a channel in which nothing is
         [("0.mlp.act_in.2", "0.mlp.post_act.0"), ("0.mlp.post_act.0", "0.mlp.resid_delta.3")]),
        ({"1.attn.act_in.0", "1.attn.q.0", "1.attn.k.0"},  # a head that moves no value
         [("1.attn.act_in.0", "1.attn.q.0"), ("1.attn.act_in.0", "1.attn.k.0")]),
    ],
)  # fmt: skip
def test_what_lies_on_no_path_goes_with_its_edges(extra, edges):
    assert dangling(small(), ON_PATH | extra, PATH + edges) == (ON_PATH, 2)


def test_a_write_that_is_read_again_and_a_head_that_moves_it_stay():
    path = [
        ("0.mlp.act_in.0", "0.mlp.post_act.1"),
        ("0.mlp.post_act.1", "0.mlp.resid_delta.2"),
        ("1.attn.act_in.2", "1.attn.v.1"),
        ("1.attn.act_in.1", "1.attn.q.0"),
        ("1.attn.v.1", "1.attn.resid_delta.3"),
    ]
    kept = {end for edge in path for end in edge}
    assert dangling(small(), kept, path) == (kept, 5)
    # The query of the other head has no value to move.
    other = {"1.attn.q.2"}
    assert dangling(small(), kept | other, [*path, ("1.attn.act_in.1", "1.attn.q.2")]) == (kept, 5)
    # Without its last edge the whole path hangs in the air.
    assert dangling(small(), kept, path[:-1]) == (set(), 0)


HANGING = [
    ("0.mlp.post_act.0", "0.mlp.resid_delta.3"),
    ("0.mlp.post_act.2", "0.mlp.resid_delta.3"),
    ("0.mlp.act_in.1", "0.mlp.post_act.1"),
]


@pytest.mark.parametrize("needed", [set(), {"0.mlp.post_act.2"}, {"0.mlp.post_act.0", "0.mlp.post_act.2"}])
def test_a_constant_that_is_needed_stays(needed):
    model = small()
    model.embed_tokens.weight[:, 1] = 0  # so that nothing is in the channel of act_in.1
    nodes, edges = written_out(model, {end for edge in PATH + HANGING for end in edge}, PATH + HANGING)
    seen = []

    def meets(nodes, edges):
        seen.append(names(nodes))
        assert names(nodes) >= ON_PATH
        return names(nodes) >= needed

    left, kept = trim_dangling(model, nodes, edges, meets, runs=50)
    assert names(left) == ON_PATH | needed and edge_total(kept) == 2 + len(needed)
    assert seen[0] == ON_PATH and len(seen) <= 8
    same, _ = trim_dangling(model, nodes, edges, meets, runs=0)
    assert names(same) == names(nodes)


def test_nothing_is_asked_where_nothing_hangs():
    model = small()
    nodes, edges = written_out(model, ON_PATH, PATH)
    left, kept = trim_dangling(model, nodes, edges, lambda nodes, edges: False, runs=50)
    assert names(left) == ON_PATH and edge_total(kept) == 2


def test_added_positions_are_in_every_channel_of_the_stream():
    shape = Architecture(vocab_size=3, context=4, n_layer=1, d_model=4, d_head=2, d_mlp=3, position="added")
    model = SparseTransformer.build(shape).eval().requires_grad_(False)
    model.embed_tokens.weight.zero_()
    assert dangling(model, ON_PATH, PATH) == (ON_PATH, 2)
    model.embed_positions.weight.zero_()
    assert dangling(model, ON_PATH, PATH) == (set(), 0)

"""Edges: sets of them by hand, what a dropped edge amounts to, and gradients to gates."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from distill.circuits.ablation import Resampled, node_means
from distill.circuits.edges import (
    EdgeTap,
    checked_edges,
    chosen_edges,
    circuit_tap,
    edge_difference,
    edge_intersection,
    edge_total,
    edge_union,
    edges_between,
    induced_edge_set,
)
from distill.circuits.masks import MaskTap, all_nodes
from distill.model.anatomy import anatomy
from distill.model.dense import DenseModel
from distill.model.sites import chain
from distill.model.transformer import Architecture, SparseTransformer

QK = ("0.attn.act_in", "0.attn.q")
OUT = ("0.attn.v", "0.attn.resid_delta")
TINY = Architecture(vocab_size=11, context=8, n_layer=2, d_model=8, d_head=4, d_mlp=12, bigram=False)


def tiny(seed=0, **changes):
    model = SparseTransformer.build(replace(TINY, **changes), seed=seed).double().eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def gpt2():
    model = DenseModel.build_gpt2(replace(TINY, d_model=64, d_head=32)).double().requires_grad_(False)
    for parameter in model.parameters():
        parameter += 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    return model


def words(rows=4, length=6, seed=0):
    return torch.randint(0, 11, (rows, length), generator=torch.Generator().manual_seed(seed))


def some(model, share, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {location: torch.rand(width, generator=generator) < share for location, width in model.widths.items()}


def without(edges, location, channel):
    """The edges that do not start at one node."""
    return {
        (source, target): index[:, index[1] != channel] if source == location else index
        for (source, target), index in edges.items()
    }


def test_induced_edges_by_hand(make_planted, choose):
    edges = induced_edge_set(make_planted(0), choose(make_planted(0)))
    assert {matrix: index.tolist() for matrix, index in edges.items() if index.shape[1]} == {
        ("0.attn.act_in", "0.attn.q"): [[0], [1]],
        ("0.attn.act_in", "0.attn.k"): [[0], [2]],
        ("0.attn.act_in", "0.attn.v"): [[0], [0]],
        ("0.attn.v", "0.attn.resid_delta"): [[3], [0]],
    }
    assert len(edges) == 6 and edge_total(edges) == 4
    stray = make_planted(0, stray=0.1)
    assert edge_total(induced_edge_set(stray, choose(stray))) == 10


@given(
    st.sets(st.tuples(st.integers(0, 4), st.integers(0, 4))), st.sets(st.tuples(st.integers(0, 4), st.integers(0, 4)))
)
def test_set_algebra_is_that_of_sets(one, other):
    nodes = {QK[0]: torch.ones(5, dtype=torch.bool), QK[1]: torch.ones(5, dtype=torch.bool)}

    def edges(pairs):
        return checked_edges({QK: torch.tensor(list(pairs), dtype=torch.long).view(-1, 2).T}, nodes)

    def pairs(found):
        return [tuple(pair) for pair in found[QK].T.tolist()]

    mine, theirs = edges(one), edges(other)
    assert pairs(mine) == sorted(one)
    assert pairs(edge_union(mine, theirs)) == sorted(one | other)
    assert pairs(edge_intersection(mine, theirs)) == sorted(one & other)
    assert pairs(edge_difference(mine, theirs)) == sorted(one - other)


def test_some_edges_by_hand():
    edges = {QK: torch.tensor([[0, 0, 2], [1, 3, 0]]), OUT: torch.tensor([[5], [2]])}
    picked = chosen_edges(edges, torch.tensor([False, True, False, True]))
    assert picked[QK].tolist() == [[0], [3]] and picked[OUT].tolist() == [[5], [2]]
    nodes = {QK[0]: torch.tensor([True, True, True, False]), QK[1]: torch.tensor([True, False, True])}
    nodes |= {OUT[0]: torch.zeros(4, dtype=torch.bool), OUT[1]: torch.ones(6, dtype=torch.bool)}
    inside = edges_between(edges, nodes)
    assert inside[QK].tolist() == [[0, 2], [1, 0]] and inside[OUT].shape == (2, 0)


def index(*pairs):
    return torch.tensor(pairs).T


@pytest.mark.parametrize(
    ("edges", "message"),
    [
        ({("0.attn.q", "0.attn.v"): index((0, 0))}, r"'0\.attn\.q -> 0\.attn\.v' is no matrix.*allowed are 0\.attn"),
        ({("0.attn.act_in", "1.attn.q"): index((0, 0))}, "is no matrix"),
        ({QK: torch.zeros(3, 1, dtype=torch.long)}, r"shape \(3, 1\).*allowed are \(2, n\) whole numbers"),
        ({QK: torch.zeros(2, 1)}, r"torch\.float32; allowed"),
        ({QK: index((0, 99))}, r"channels 99 to 99 of 0\.attn\.act_in; allowed are 0 to 15"),
        ({QK: index((-1, 0))}, r"channels -1 to -1 of 0\.attn\.q; allowed are 0 to 7"),
        ({QK: index((0, 5))}, r"an edge at 0\.attn\.act_in\.5, which is no node of the circuit"),
        ({QK: index((0, 1), (0, 1))}, "has an edge twice"),
    ],
)
def test_edges_that_no_circuit_can_have_are_refused(planted, choose, edges, message):
    with pytest.raises(ValueError, match=message):
        checked_edges(edges, choose(planted))


# What a dropped edge amounts to.


def test_a_dropped_edge_by_hand():
    model = tiny(n_layer=1, topk_fraction=None)
    nodes, tokens = some(model, 0.7), words()
    means = node_means(model, words(8, 8, 1))
    kept = induced_edge_set(model, nodes)
    target, source = kept["0.mlp.act_in", "0.mlp.post_act"][:, 3].tolist()
    dropped = {matrix: index.clone() for matrix, index in kept.items()}
    part = dropped["0.mlp.act_in", "0.mlp.post_act"]
    dropped["0.mlp.act_in", "0.mlp.post_act"] = part[:, torch.arange(part.shape[1]) != 3]
    seen = {}

    def see(site, x):
        seen[site] = x
        return x

    model.run(tokens, tap=chain(circuit_tap(model, nodes, means, dropped), see))
    weight, bias = model.layers[0].mlp_in.weight, model.layers[0].mlp_in.bias
    read = seen["0.mlp.act_in"].clone()
    read[..., source] = means.values["0.mlp.act_in"][source]
    expected = torch.nn.functional.gelu(read @ weight[target] + bias[target])
    torch.testing.assert_close(seen["0.mlp.post_act"][..., target], expected)


MODELS = {
    "sparse": lambda: tiny(topk_fraction=None),
    "positions": lambda: tiny(topk_fraction=None, position="added"),
    "no sink": lambda: tiny(topk_fraction=None, sink=False),
    "gpt2": gpt2,
}


@pytest.mark.parametrize("protect_first", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_a_node_without_edges_out_is_a_node_that_is_dropped(name, protect_first):
    model = MODELS[name]()
    means = replace(node_means(model, words(8, 8, 1)), protect_first=protect_first)
    nodes, tokens = some(model, 0.6), words()
    edges = induced_edge_set(model, nodes)
    whole = model.run(tokens, tap=MaskTap(nodes, means))
    for location in ("0.attn.act_in", "0.attn.v", "1.mlp.act_in", "1.mlp.post_act"):
        channel = int(nodes[location].nonzero()[0])
        fewer = {place: mask.clone() for place, mask in nodes.items()}
        fewer[location][channel] = False
        expected = model.run(tokens, tap=MaskTap(fewer, means))
        found = model.run(tokens, tap=circuit_tap(model, nodes, means, without(edges, location, channel)))
        torch.testing.assert_close(found, expected)
        assert (found - whole).abs().max() > 1e-6, location


@pytest.mark.parametrize("competition", [False, True])
def test_dropped_edges_are_other_weights_and_biases(competition):
    # Without sinks, and with one mean per node, what edges are dropped can be written into weights and biases.
    model = tiny(sink=False, topk_fraction=0.5)
    means = node_means(model, words(8, 8, 1))
    nodes, tokens = some(model, 0.7), words()
    edges = induced_edge_set(model, nodes)
    kept = chosen_edges(edges, torch.rand(edge_total(edges), generator=torch.Generator().manual_seed(2)) < 0.5)
    found = model.run(tokens, tap=circuit_tap(model, nodes, means, kept, competition=competition))
    maps = {"q": "attn_q", "k": "attn_k", "v": "attn_v", "post_act": "mlp_in"}
    for (source, target), gone in edge_difference(edges, kept).items():
        layer = model.layers[int(target[0])]
        out = "attn_out" if source.endswith("attn.v") else "mlp_out"
        linear = getattr(layer, maps.get(target.rpartition(".")[2], out))
        lost = torch.zeros_like(linear.weight)
        lost[gone[0], gone[1]] = linear.weight[gone[0], gone[1]]
        linear.weight -= lost
        linear.bias += lost @ means.values[source].double()
    torch.testing.assert_close(found, model.run(tokens, tap=MaskTap(nodes, means, competition=competition)))


def test_all_edges_equal_no_word_about_edges(planted, planted_means, make_prompts, choose):
    nodes = choose(planted)
    tap = circuit_tap(planted, nodes, planted_means, induced_edge_set(planted, nodes))
    assert isinstance(tap, MaskTap)
    tokens = make_prompts(3, 0).tokens
    nothing = EdgeTap(planted, checked_edges({}, nodes), planted_means)
    with torch.no_grad():
        assert torch.equal(planted.run(tokens, tap=nothing), planted.run(tokens))


def test_without_any_edge_a_protected_position_0_runs_as_it_is():
    model = gpt2()
    means = replace(node_means(model, words(8, 8, 1)), protect_first=True)
    nodes = all_nodes(model.widths)
    found = model.run(words(), tap=circuit_tap(model, nodes, means, checked_edges({}, nodes)))
    whole = model.run(words())
    torch.testing.assert_close(found[:, 0], whole[:, 0])
    assert (found[:, 1:] - whole[:, 1:]).abs().max() > 0.1


def test_resampled_values_are_the_same_for_nodes_and_edges():
    model = tiny(topk_fraction=None)
    means, tokens = node_means(model, words(8, 8, 1)), words()
    pool = {place: torch.randn(7, width, generator=torch.Generator().manual_seed(3)) for place, width in
            model.widths.items()}  # fmt: skip
    drawn = Resampled(values=pool, magnitude=means.magnitude, model=means.model, data="", tokens=7,
                      index=torch.randint(0, 7, (4, 6), generator=torch.Generator().manual_seed(4)))  # fmt: skip
    nodes = some(model, 0.6)
    channel = int(nodes["0.attn.v"].nonzero()[0])
    edges = without(induced_edge_set(model, nodes), "0.attn.v", channel)
    found = model.run(tokens, tap=circuit_tap(model, nodes, drawn, edges))
    nodes["0.attn.v"][channel] = False
    torch.testing.assert_close(found, model.run(tokens, tap=MaskTap(nodes, drawn)))


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 100), st.sampled_from(["sparse", "gpt2"]))
def test_the_gradient_of_a_gate_is_the_slope_of_the_run(seed, name):
    model = MODELS[name]()
    means, tokens, nodes = node_means(model, words(8, 8, 1)), words(), some(model, 0.4, seed)
    edges = induced_edge_set(model, nodes)
    generator = torch.Generator().manual_seed(seed)
    start = {matrix: torch.rand(index.shape[1], generator=generator, dtype=torch.double) for matrix, index in
             edges.items()}  # fmt: skip
    step = {matrix: torch.randn(len(gate), generator=generator, dtype=torch.double) for matrix, gate in start.items()}

    def value(gates):
        tap = chain(MaskTap(nodes, means), EdgeTap(model, edges, means, gates))
        return model.run(tokens, tap=tap)[:, -1].square().sum()

    gates = {matrix: gate.clone().requires_grad_() for matrix, gate in start.items()}
    slopes = torch.autograd.grad(value(gates), list(gates.values()), allow_unused=True)
    found = sum(
        float((slope * step[matrix]).sum()) for matrix, slope in zip(gates, slopes, strict=True) if slope is not None
    )
    h = 1e-6
    ahead, behind = (value({m: start[m] + sign * h * step[m] for m in start}) for sign in (1, -1))
    assert found == pytest.approx(float(ahead - behind) / (2 * h), rel=1e-4, abs=1e-6)
    ones = {matrix: torch.ones(index.shape[1], dtype=torch.double) for matrix, index in edges.items()}
    whole = model.run(tokens, tap=MaskTap(nodes, means))[:, -1].square().sum()
    torch.testing.assert_close(value(ones), whole)


def test_edges_of_gated_neurons_and_shared_values_are_not_cut():
    config = LlamaConfig(
        vocab_size=11, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=8, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = DenseModel(LlamaForCausalLM(config).eval())
    means = node_means(model, torch.randint(11, (4, 6), generator=torch.Generator().manual_seed(0)))
    assert anatomy(model).uncut == ("a gated MLP", "values shared by heads")
    EdgeTap(model, {QK: torch.zeros(2, 0, dtype=torch.long)}, means)  # nothing is cut
    with pytest.raises(ValueError, match="edges: the model has a gated MLP and values shared by heads, no single edge"):
        EdgeTap(model, {QK: torch.zeros(2, 1, dtype=torch.long)}, means)

"""A circuit on its own equals the masked model: for random models, node sets and edge sets, and in parts."""

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel

from distill.artifact import ArtifactError, save_tensors
from distill.circuits.ablation import FreezeNorms, Resampled, node_means
from distill.circuits.answers import answer_difference, frozen_norms
from distill.circuits.edges import chosen_edges, circuit_tap, edge_total, induced_edge_set
from distill.circuits.masks import all_nodes, node_count
from distill.circuits.standalone import Standalone, standalone
from distill.circuits.subject import load_subject
from distill.model.dense import DenseModel
from distill.model.sites import chain
from distill.model.transformer import Architecture, SparseTransformer

ROWS, LENGTH, CONTEXT, VOCABULARY = 4, 6, 8, 11
SHAPE = Architecture(vocab_size=VOCABULARY, context=CONTEXT, n_layer=2, d_model=12, d_head=4, d_mlp=20)


def stirred(model, seed):
    """Double precision, so that no tie of AbsTopK is decided by rounding; every parameter away from its start."""
    model = model.double().eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
        if parameter.dim() == 2 and parameter.shape[0] not in (VOCABULARY, CONTEXT):
            parameter *= torch.rand(parameter.shape, generator=generator) < 0.6
    return model


def sparse(seed=0, **changes):
    return stirred(SparseTransformer.build(replace(SHAPE, **changes), seed=seed), seed)


def gpt2(seed=0):
    return stirred(DenseModel.build_gpt2(replace(SHAPE, d_model=64, d_head=32), seed=seed), seed)


def other_gpt2(seed=0):
    """With other options that its configuration has: of the scale of scores, of the non-linearity."""
    config = GPT2Config(vocab_size=VOCABULARY, n_positions=CONTEXT, n_embd=24, n_layer=2, n_head=3, n_inner=20,
                        bos_token_id=0, eos_token_id=0, scale_attn_by_inverse_layer_idx=True,
                        activation_function="silu")  # fmt: skip
    return stirred(DenseModel(GPT2LMHeadModel(config)), seed)


def words(rows=ROWS, length=LENGTH, seed=0):
    return torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def circuit(model, share, edge_share, seed, **changes):
    """Random nodes, edges (None: all) and ablation values."""
    generator = torch.Generator().manual_seed(seed)
    nodes = {location: torch.rand(width, generator=generator) < share for location, width in model.widths.items()}
    induced = induced_edge_set(model, nodes)
    kept = torch.rand(edge_total(induced), generator=generator) < edge_share
    per_position = changes.pop("per_position", None)
    means = replace(node_means(model, words(8, CONTEXT, seed), per_position=per_position), **changes)
    return nodes, means, None if edge_share == 1 else chosen_edges(induced, kept)


def assert_equal_to_masked(model, nodes, means, edges, seed, **tolerance):
    module = standalone(model, nodes, means, edges)
    tokens = words(seed=seed)
    masked = model.run(tokens, tap=circuit_tap(model, nodes, means, edges))
    torch.testing.assert_close(module(tokens), masked, **tolerance)
    generator = torch.Generator().manual_seed(seed)
    last = torch.randint(0, LENGTH, (ROWS,), generator=generator)
    ids = torch.randint(0, VOCABULARY, (ROWS, 3), generator=generator)
    asked = masked[torch.arange(ROWS), last].gather(1, ids)
    torch.testing.assert_close(module.answers(tokens, last, ids), asked, **tolerance)
    return module


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    position=st.sampled_from(["none", "added", "concat"]),
    sink=st.booleans(),
    bigram=st.booleans(),
    norm=st.sampled_from(["rms", "layer"]),
    topk_fraction=st.sampled_from([0.25, 0.5, None]),
    activation=st.sampled_from(["gelu", "gelu_new", "relu"]),
    tied_unembedding=st.booleans(),
    share=st.sampled_from([0.0, 0.15, 0.5, 0.9, 1.0]),
    edge_share=st.sampled_from([0.0, 0.5, 1]),
    per_position=st.booleans(),
    protect_first=st.booleans(),
)
def test_a_circuit_on_its_own_equals_the_masked_model(
    seed, share, edge_share, per_position, protect_first, position, norm, **changes
):
    model = sparse(
        seed,
        position=position,
        d_position=3 if position == "concat" else 0,
        norm=norm,
        norm_bias=norm == "layer",
        logits_bias=bool(seed % 2),
        linear_bias=bool(seed % 3),
        **changes,
    )
    means = {"per_position": per_position, "protect_first": protect_first}
    assert_equal_to_masked(model, *circuit(model, share, edge_share, seed, **means), seed, rtol=1e-9, atol=1e-9)


@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    share=st.sampled_from([0.0, 0.2, 0.6, 1.0]),
    edge_share=st.sampled_from([0.5, 1]),
    per_position=st.booleans(),
    protect_first=st.booleans(),
)
def test_a_circuit_of_gpt2_on_its_own_equals_the_masked_model(seed, share, edge_share, per_position, protect_first):
    model = gpt2(seed)
    means = {"per_position": per_position, "protect_first": protect_first}
    assert_equal_to_masked(model, *circuit(model, share, edge_share, seed, **means), seed, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("make", [sparse, gpt2, other_gpt2])
def test_in_single_precision_they_agree_to_a_hundred_thousandth(make):
    model = make(3).float()
    assert_equal_to_masked(model, *circuit(model, 0.4, 0.7, 3), 3, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["sparse", "dense_gpt2"])
def test_circuits_of_shipped_models_stand_alone(name):
    subject = load_subject(name)
    generator = torch.Generator().manual_seed(0)
    nodes = {place: torch.rand(width, generator=generator) < 0.03 for place, width in subject.model.widths.items()}
    induced = induced_edge_set(subject.model, nodes)
    edges = chosen_edges(induced, torch.rand(edge_total(induced), generator=generator) < 0.7)
    tokens = subject.sample[:3, :24]
    with torch.no_grad():
        masked = subject.model.run(tokens, tap=circuit_tap(subject.model, nodes, subject.means, edges))
        found = standalone(subject.model, nodes, subject.means, edges)(tokens)
    torch.testing.assert_close(found, masked, rtol=1e-5, atol=1e-5)


def test_it_holds_the_kept_nodes_and_edges_and_nothing_of_the_model(make_planted, make_windows, make_prompts, choose):
    model = make_planted(0, stray=0.1)
    nodes, means, batch = choose(model), node_means(model, make_windows()), make_prompts(8, 0)
    edges = induced_edge_set(model, nodes)
    edges["0.attn.act_in", "0.attn.q"] = torch.tensor([[0], [1]])
    module = standalone(model, nodes, means, edges)
    assert module.head.nodes == 7 and module.head.edges == edge_total(edges) == 8
    blocks = {name: tuple(value.shape) for name, value in module.state_dict().items() if name.endswith("/weight")}
    assert blocks == {"0:attn:q/weight": (1, 3), "0:attn:k/weight": (1, 3), "0:attn:v/weight": (1, 3),
                      "0:attn:resid_delta/weight": (1, 1)}  # fmt: skip
    with torch.no_grad():
        before = module.difference(batch)
        expected = answer_difference(model, batch, circuit_tap(model, nodes, means, edges))
        for parameter in model.parameters():
            parameter.zero_()
    torch.testing.assert_close(before, expected)
    assert torch.equal(module.difference(batch), before)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 1000), st.sampled_from([sparse, gpt2]))
def test_any_part_of_it_equals_the_masked_model(make_prompts, seed, make):
    model, batch = make(seed), make_prompts(3, seed, longest=8)
    nodes, means, _ = circuit(model, 0.7, 1, seed)
    module = standalone(model, nodes, means)
    generator = torch.Generator().manual_seed(seed)
    part = {place: mask & (torch.rand(len(mask), generator=generator) < 0.6) for place, mask in nodes.items()}
    inside = induced_edge_set(model, part)
    edges = chosen_edges(inside, torch.rand(edge_total(inside), generator=generator) < 0.7)
    for chosen in (None, edges):
        expected = answer_difference(model, batch, circuit_tap(model, part, means, chosen))
        torch.testing.assert_close(module.difference(batch, nodes=part, edges=chosen), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", [sparse, gpt2])
def test_norms_can_be_frozen_at_those_of_the_whole_model(make, make_prompts):
    model, batch = make(1), make_prompts(4, 1, longest=8)
    nodes, means, edges = circuit(model, 0.3, 0.6, 1)
    scales = frozen_norms(model, batch)
    assert isinstance(scales, FreezeNorms)
    expected = answer_difference(model, batch, chain(scales, circuit_tap(model, nodes, means, edges)))
    module = standalone(model, nodes, means, edges)
    torch.testing.assert_close(module.difference(batch, norms=scales), expected)
    assert (module.difference(batch) - expected).abs().max() > 1e-3


def test_first_tokens_limit_what_may_stand_at_a_protected_position():
    model = gpt2()
    nodes, means, edges = circuit(model, 0.3, 1, 0, protect_first=True)
    tokens = words()
    tokens[:, 0] = torch.tensor([2, 5, 5, 2])
    module = standalone(model, nodes, means, edges, first_tokens=tokens[:, 0])
    torch.testing.assert_close(module(tokens), model.run(tokens, tap=circuit_tap(model, nodes, means, edges)))
    tokens[1, 0] = 7
    with pytest.raises(ValueError, match=r"token 7 at position 0.*made for 2 other tokens there \(first_tokens\)"):
        module(tokens)


def test_saved_and_loaded_it_gives_the_same(tmp_path):
    for model in (sparse(1, position="concat", d_position=3), gpt2(2)):
        nodes, means, edges = circuit(model, 0.3, 0.5, 1)
        module = standalone(model, nodes, means, edges)
        back = Standalone.load(module.save(tmp_path / "alone.safetensors"))
        assert torch.equal(back(words()), module(words()))
        assert back.head.nodes == node_count(nodes)
    save_tensors(tmp_path / "other.safetensors", {}, {"kind": "circuit"})
    with pytest.raises(ArtifactError, match="standalone"):
        Standalone.load(tmp_path / "other.safetensors")
    save_tensors(tmp_path / "other.safetensors", {}, {"kind": "standalone"})
    with pytest.raises(ArtifactError, match="no whole circuit"):
        Standalone.load(tmp_path / "other.safetensors")


def test_what_cannot_stand_alone_is_refused_in_words():
    for changes, words_of in (
        ({"residual_activation": "relu"}, "relu on the residual stream"),
        ({"topk_at": ("resid_post_mlp",)}, "AbsTopK on the residual stream \\(resid_post_mlp\\)"),
    ):
        model = sparse(**changes)
        with pytest.raises(ValueError, match=words_of):
            standalone(model, all_nodes(model.widths), node_means(model, words()))
    model = sparse()
    means = node_means(model, words())
    pool = {place: value.expand(3, -1) for place, value in means.values.items()}
    drawn = Resampled(values=pool, magnitude=means.magnitude, model=means.model, data="", tokens=3,
                      index=torch.zeros(ROWS, LENGTH, dtype=torch.long))  # fmt: skip
    with pytest.raises(ValueError, match="one value per prompt"):
        standalone(model, all_nodes(model.widths), drawn)


def test_the_number_of_threads_is_put_back(make_prompts):
    model = sparse()
    nodes, means, _ = circuit(model, 0.5, 1, 0)
    module, batch = standalone(model, nodes, means), make_prompts(2, 0, longest=8)
    alone = module.difference(batch)
    torch.set_num_threads(2)
    torch.testing.assert_close(module.difference(batch), alone)
    assert torch.get_num_threads() == 2
    with pytest.raises(ValueError, match="vocabulary"):
        module.difference(replace(batch, tokens=batch.tokens + 100))
    assert torch.get_num_threads() == 2


def test_texts_it_cannot_read_are_refused_in_words():
    model = sparse()
    nodes, means, _ = circuit(model, 0.5, 1, 0)
    module = standalone(model, nodes, means)
    with pytest.raises(ValueError, match="9 tokens; this circuit reaches as far as 8"):
        module(words(length=CONTEXT + 1))
    with pytest.raises(ValueError, match="the vocabulary of this circuit's model has 11"):
        module(torch.full((1, 2), VOCABULARY))
    short = standalone(model, nodes, node_means(model, words(length=5), per_position=True))
    with pytest.raises(ValueError, match="6 tokens; this circuit reaches as far as 5"):
        short(words())
    outside = {("0.attn.act_in", "0.attn.q"): torch.tensor([[0], [int((~nodes["0.attn.act_in"]).nonzero()[0])]])}
    with pytest.raises(ValueError, match="source channel .* is not among the nodes kept there"):
        module.gates(edges=outside)

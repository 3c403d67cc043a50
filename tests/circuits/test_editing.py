"""Editing: what a tap does stands in the weights afterwards, to the last digit where nothing changes."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from distill.circuits.ablation import Means, node_means
from distill.circuits.edges import induced_edge_set
from distill.circuits.editing import (
    Change,
    Cut,
    InexactError,
    ModelEdit,
    constants,
    edge_names,
    obstacle,
    parse_edge,
    plan,
)
from distill.circuits.masks import MaskTap, all_nodes
from distill.model import Architecture, DenseModel, SparseTransformer
from distill.model.sites import Tap, kind_of

KINDS = ("attn.act_in", "attn.q", "attn.k", "attn.v", "attn.resid_delta", "mlp.act_in", "mlp.post_act",
         "mlp.resid_delta")  # fmt: skip
TOKENS = torch.randint(0, 31, (4, 9), generator=torch.Generator().manual_seed(0))


def sparse(seed: int = 0, **options: object) -> SparseTransformer:
    shape = {"vocab_size": 31, "context": 9, "n_layer": 2, "d_model": 16, "d_head": 4, **options}
    model = SparseTransformer.build(Architecture(**shape), seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
            elif "bigram" not in name:
                parameter *= 2
    return model.eval()


def gpt2() -> DenseModel:
    torch.manual_seed(0)
    config = GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=31, n_positions=9, initializer_range=0.3,
                        bos_token_id=0, eos_token_id=0)  # fmt: skip
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter += 0.2 * torch.randn(parameter.shape)
    return DenseModel(model)


MODELS = {
    "sparse": sparse(),
    "no sink": sparse(sink=False),
    "no topk": sparse(topk_fraction=None),
    "no bias": sparse(linear_bias=False),
    "concat": sparse(position="concat", d_position=4),
    "layer norm": sparse(norm="layer", norm_bias=True, residual_activation="relu"),
    "gpt2": gpt2(),
}


def logits(model: SparseTransformer | DenseModel, tap: Tap | None = None) -> Tensor:
    with torch.no_grad():
        return model.run(TOKENS, tap=tap)


def states_equal(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(
        torch.equal(value.view(torch.int32), theirs[name].view(torch.int32)) for name, value in mine.items()
    )


@pytest.mark.parametrize("name", MODELS)
def test_scale_one_changes_no_bit(name: str) -> None:
    model = MODELS[name]
    values = constants(node_means(model, TOKENS))
    names = [f"1.{kind}.{channel}" for kind in KINDS for channel in (0, 3)]
    edited = plan("scale", names, values, factor=1.0).apply(model)
    assert edited is not model and states_equal(edited, model)
    assert torch.equal(logits(edited), logits(model))


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=6, deadline=None)
@given(data=st.data())
def test_the_edited_model_is_the_tapped_one(name: str, data: st.DataObject) -> None:
    """Every place and change that is not refused, several at once."""
    model = MODELS[name]
    values = constants(node_means(model, TOKENS))
    makes = st.builds(
        Change,
        node=st.sampled_from([f"{i}.{kind}.{c}" for i in range(2) for kind in KINDS for c in (0, 2, 5, 15)]),
        factor=st.sampled_from([0.0, 0.5, -1.0, 2.0]),
        value=st.sampled_from([0.0, 0.7, -1.3]),
    )
    changes = data.draw(st.lists(makes, min_size=1, max_size=6, unique_by=lambda one: one.node))
    changes = [
        replace(one, competition=False) if one.factor == 0 and data.draw(st.booleans()) else one for one in changes
    ]
    edit = ModelEdit(changes=tuple(one for one in changes if obstacle(model, one) is None))
    before = logits(model)
    torch.testing.assert_close(logits(edit.apply(model)), logits(model, edit.tap(model)), atol=1e-5, rtol=1e-5)
    assert torch.equal(logits(model), before)
    assert values.keys() == model.widths.keys()


@pytest.mark.parametrize("name", ["sparse", "no topk", "no bias", "gpt2"])
@pytest.mark.parametrize("kind", ["attn.act_in", "mlp.act_in", "mlp.post_act"])
def test_ablated_is_held_at_its_mean(name: str, kind: str) -> None:
    """Against the tap that circuits are run with, in and out of competition."""
    model = MODELS[name]
    values = constants(node_means(model, TOKENS))
    held = Means(values=values, magnitude=values, model="", data="", tokens=0)
    nodes = all_nodes(model.widths)
    chosen = [1, 4, 7]
    nodes[f"0.{kind}"][chosen] = False
    for competition in (True, False):
        edit = plan("ablate", [f"0.{kind}.{c}" for c in chosen], values, competition=competition)
        masked = logits(model, MaskTap(nodes, held, competition=competition))
        torch.testing.assert_close(logits(edit.apply(model)), masked, atol=1e-5, rtol=1e-5)
    assert float((masked - logits(model)).abs().max()) > 1e-3


@pytest.mark.parametrize("kind", ["attn.q", "attn.k", "attn.v", "attn.resid_delta", "mlp.resid_delta"])
def test_dense_places_without_readers_are_exact_too(kind: str) -> None:
    model = MODELS["gpt2"]
    edit = plan("scale", [f"0.{kind}.3", f"1.{kind}.2"], constants(node_means(model, TOKENS)), factor=-0.5)
    found, tapped = logits(edit.apply(model)), logits(model, edit.tap(model))
    torch.testing.assert_close(found, tapped, atol=1e-5, rtol=1e-5)
    assert float((found - logits(model)).abs().max()) > 1e-4


@pytest.mark.parametrize("name", ["sparse", "no sink", "gpt2"])
def test_cut_edges_contribute_their_sources_mean(name: str) -> None:
    model = MODELS[name]
    values = constants(node_means(model, TOKENS))
    every = induced_edge_set(model, all_nodes(model.widths))
    chosen = [
        edge
        for matrix, index in every.items()
        for edge in edge_names({matrix: index[:, ::97]})
        if name != "sparse" or kind_of(matrix[0]) != "attn.v"
    ]
    edit = plan("cut-edges", chosen, values)
    edited = edit.apply(model)
    assert len(chosen) == sum(int((weight != 0).sum()) for weight in model.matrices().values()) - sum(
        int((weight != 0).sum()) for weight in edited.matrices().values()
    )
    torch.testing.assert_close(logits(edited), logits(model, edit.tap(model)), atol=1e-5, rtol=1e-5)


def test_cuts_and_changes_together() -> None:
    model = MODELS["no sink"]
    source, target = edge_names(induced_edge_set(model, all_nodes(model.widths)))[40].split("->")
    edit = ModelEdit(
        changes=(Change(node=source, factor=0.5, value=0.4), Change(node="1.mlp.post_act.3", value=-0.2)),
        cuts=(Cut(source=source, target=target, value=0.3),),
    )
    torch.testing.assert_close(logits(edit.apply(model)), logits(model, edit.tap(model)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("node", "words"),
    [
        ("0.attn.v.1", "behind attention, whose sink takes a share"),
        ("0.attn.q.1", "AbsTopK chooses behind"),
        ("0.attn.resid_delta.1", "AbsTopK chooses behind"),
        ("1.mlp.resid_delta.1", "AbsTopK chooses behind"),
    ],
)
def test_what_no_weights_stand_for_is_refused_unless_asked_for(node: str, words: str) -> None:
    model = MODELS["sparse"]
    with pytest.raises(InexactError, match=words):
        plan("clamp", [node], constants(node_means(model, TOKENS)), value=0.5).apply(model)
    asked = plan("clamp", [node], constants(node_means(model, TOKENS)), value=0.5, inexact=True).apply(model)
    assert float((logits(asked) - logits(model)).abs().max()) > 0
    exact = ModelEdit(changes=(Change(node=node, competition=False),))
    torch.testing.assert_close(logits(exact.apply(model)), logits(model, exact.tap(model)), atol=1e-5, rtol=1e-5)


def test_a_constant_behind_a_sink_differs_from_token_to_token() -> None:
    """Why a value is refused: what attention makes of a constant is that times what the sink leaves over."""
    model = MODELS["no topk"]
    edit = plan("clamp", ["0.attn.v.1"], {"0.attn.v": torch.zeros(16)}, value=0.5)
    # Without AbsTopK the row of the map makes the constant itself, which is exact with a sink too.
    torch.testing.assert_close(logits(edit.apply(model)), logits(model, edit.tap(model)), atol=1e-5, rtol=1e-5)
    assert obstacle(model, Cut(source="0.attn.v.1", target="0.attn.resid_delta.1", value=0.5)) is not None


def test_constants_are_over_positions_without_a_protected_first() -> None:
    rows = torch.tensor([[10.0, 0.0], [1.0, 2.0], [3.0, 4.0]])
    means = Means(values={"0.attn.q": rows}, magnitude={}, model="", data="", tokens=3)
    assert constants(means)["0.attn.q"].tolist() == pytest.approx([14 / 3, 2.0])
    assert constants(replace(means, protect_first=True))["0.attn.q"].tolist() == [2.0, 3.0]
    assert constants(replace(means, values={"0.attn.q": rows[0]}))["0.attn.q"].tolist() == [10.0, 0.0]


def test_what_is_refused() -> None:
    model = MODELS["sparse"]
    values = constants(node_means(model, TOKENS))
    for options, words in (
        ({"op": "melt"}, "op: got 'melt'"),
        ({"op": "scale"}, "factor: got None"),
        ({"op": "ablate", "factor": 0.5}, "factor: got 0.5"),
        ({"op": "clamp"}, "value: missing"),
        ({"op": "ablate", "value": 1.0}, "value: got 1.0 with ablate"),
        ({"op": "ablate", "names": []}, "nodes: none given"),
        ({"op": "ablate", "names": ["0.mlp.act_in.99"]}, "none of this model's"),
        ({"op": "ablate", "names": ["0.mlp.act_in.1"] * 2}, "each node once"),
        ({"op": "cut-edges", "names": ["0.mlp.act_in.1"]}, "allowed is SOURCE->TARGET"),
    ):
        with pytest.raises(ValueError, match=words):
            plan(**{"names": ["0.mlp.act_in.1"], "means": values, **options})
    with pytest.raises(ValueError, match="is no weight of this model"):
        plan("cut-edges", ["0.mlp.act_in.1->0.attn.q.1"], values).apply(model)
    with pytest.raises(ValueError, match="none of this model's"):
        ModelEdit(changes=(Change(node="7.mlp.act_in.1"),)).apply(model)
    with pytest.raises(ValueError, match="out of competition, allowed is 0"):
        ModelEdit(changes=(Change(node="0.mlp.act_in.1", factor=0.5, competition=False),))
    assert parse_edge("0.mlp.act_in.3->0.mlp.post_act.17") == ("0.mlp.act_in.3", "0.mlp.post_act.17")


def test_a_node_and_an_edge_into_it_are_refused_together() -> None:
    """What the edge contributes would go into a row that the change overwrites."""
    model = MODELS["no topk"]
    source, target = edge_names(induced_edge_set(model, all_nodes(model.widths)))[40].split("->")
    cut, change = Cut(source=source, target=target, value=0.3), Change(node=target, value=0.2)
    with pytest.raises(ValueError, match=f"{target} is changed and has an edge cut into it"):
        ModelEdit(changes=(change,), cuts=(cut,))
    assert ModelEdit(cuts=(cut,)).cuts == (cut,)


def unbiased(kind: str) -> DenseModel:
    """A dense model without biases in its linear maps (a Llama), or in those of its queries, keys and values."""
    torch.manual_seed(0)
    if kind == "llama":
        config = LlamaConfig(num_hidden_layers=2, hidden_size=16, intermediate_size=24, num_attention_heads=2,
                             num_key_value_heads=2, vocab_size=31, max_position_embeddings=9)  # fmt: skip
        return DenseModel(LlamaForCausalLM(config).eval())
    config = GPTNeoConfig(num_layers=2, hidden_size=16, intermediate_size=24, num_heads=2, vocab_size=31,
                          max_position_embeddings=9, window_size=9, attention_types=[[["global"], 2]],
                          bos_token_id=0, eos_token_id=0)  # fmt: skip
    return DenseModel(GPTNeoForCausalLM(config).eval())


@pytest.mark.parametrize(
    ("kind", "refused", "allowed"),
    [
        ("llama", ("0.mlp.post_act.1", "0.mlp.act_in.1", "0.attn.q.1", "1.mlp.resid_delta.1"), ()),
        ("gpt_neo", ("0.attn.act_in.1", "0.attn.q.1"), ("0.mlp.post_act.1", "0.mlp.act_in.1", "0.attn.resid_delta.1")),
    ],
)
def test_a_constant_needs_a_bias_to_go_into_which_is_said_before(
    kind: str, refused: tuple[str, ...], allowed: tuple[str, ...]
) -> None:
    model = unbiased(kind)
    for node in (*refused, *allowed):
        held = ModelEdit(changes=(Change(node=node, value=0.5),))
        assert held.exact(model) == (node in allowed) == (obstacle(model, held.changes[0]) is None)
        if node in refused:
            with pytest.raises(InexactError, match="have no bias; exact is to clamp at 0"):
                held.apply(model)
        zero = ModelEdit(changes=(Change(node=node, value=0.0), Change(node="1.mlp.post_act.3", factor=0.5)))
        assert zero.exact(model)
        expected = logits(model, zero.tap(model))
        torch.testing.assert_close(logits(zero.apply(model)), expected, atol=1e-5, rtol=1e-5)


def test_an_edge_needs_a_bias_too() -> None:
    model = unbiased("gpt_neo")
    into_query = Cut(source="0.attn.act_in.1", target="0.attn.q.2", value=0.5)
    into_neuron = Cut(source="0.mlp.act_in.1", target="0.mlp.post_act.2", value=0.5)
    assert not ModelEdit(cuts=(into_query,)).exact(model) and ModelEdit(cuts=(into_neuron,)).exact(model)
    with pytest.raises(InexactError, match="have no bias"):
        ModelEdit(cuts=(into_query,)).check(model)
    zero = ModelEdit(cuts=(replace(into_query, value=0.0),))
    torch.testing.assert_close(logits(zero.apply(model)), logits(model, zero.tap(model)), atol=1e-5, rtol=1e-5)


def test_an_edited_gpt2_loads_without_this_package(tmp_path: Path) -> None:
    model = MODELS["gpt2"]
    edited = plan("ablate", ["0.mlp.post_act.3", "1.attn.q.2"], constants(node_means(model, TOKENS))).apply(model)
    edited.hf.save_pretrained(tmp_path / "edited")
    script = (
        "import sys, json, torch\n"
        "class Away:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('distill', 'bridges'):\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Away())\n"
        "from transformers import GPT2LMHeadModel\n"
        "model = GPT2LMHeadModel.from_pretrained(sys.argv[1]).eval()\n"
        "assert not [name for name in sys.modules if name.split('.')[0] in ('distill', 'bridges')]\n"
        "with torch.no_grad():\n"
        "    print(json.dumps(model(torch.tensor(json.loads(sys.argv[2]))).logits.tolist()))\n"
    )
    words = [sys.executable, "-c", script, str(tmp_path / "edited"), json.dumps(TOKENS.tolist())]
    out = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    torch.testing.assert_close(torch.tensor(json.loads(out)), logits(edited), atol=1e-5, rtol=1e-5)

"""The parts of a model: a run put together from them by hand gives what the model gives."""

import math

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from distill.model.anatomy import FED_BY, activation, anatomy
from distill.model.dense import DenseModel
from distill.model.run import Runnable
from distill.model.sites import KINDS, Record, kind_of
from distill.model.transformer import Architecture, SparseTransformer


def sparse(**changes):
    shape = {"vocab_size": 7, "context": 6, "n_layer": 2, "d_model": 8, "d_head": 4, "d_mlp": 12} | changes
    return stirred(SparseTransformer.build(Architecture(**shape)))


def gpt2(**changes):
    shape = {"n_layer": 2, "n_embd": 12, "n_head": 3, "vocab_size": 7, "n_positions": 6, "bos_token_id": 0,
             "eos_token_id": 0} | changes  # fmt: skip
    return stirred(DenseModel(GPT2LMHeadModel(GPT2Config(**shape))))


def stirred(model):
    generator = torch.Generator().manual_seed(0)
    for parameter in model.double().eval().requires_grad_(False).parameters():
        parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize(
    "model",
    [sparse(topk_fraction=None), sparse(topk_fraction=None, linear_bias=False), gpt2(),
     gpt2(scale_attn_weights=False, activation_function="relu")],
    ids=["sparse", "without biases", "gpt2", "other gpt2"],
)  # fmt: skip
def test_weights_and_biases_lead_from_each_location_to_the_next(model):
    parts, record = anatomy(model), Record()
    model.run(torch.tensor([[1, 5, 2, 2]]), tap=record)
    matrices = model.matrices()
    assert set(parts.biases) == {target for _, target in matrices}
    for (source, target), weight in matrices.items():
        assert FED_BY[kind_of(target)] == kind_of(source)
        if kind_of(target) == "attn.resid_delta":
            continue
        z = record.values[source] @ weight.T + parts.biases[target]
        if target.endswith("post_act"):
            z = activation(parts.activation)(z)
        torch.testing.assert_close(record.values[target], z)


@pytest.mark.parametrize("model", [sparse(norm="layer", norm_bias=True), sparse(), gpt2()])
def test_norms_are_those_of_the_reads(model):
    parts, record = anatomy(model), Record()
    model.run(torch.tensor([[1, 5, 2, 2]]), tap=record)
    for i, layer in enumerate(parts.layers):
        for name, site in (("attn", "resid_in"), ("mlp", "resid_mid")):
            norm, x = layer.norms[name], record.values[f"{i}.{site}"]
            if norm.center:
                x = x - x.mean(-1, keepdim=True)
            read = x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.gain
            read = read if norm.bias is None else read + norm.bias
            seen = record.values[f"{i}.{name}.act_in"]
            torch.testing.assert_close(seen, torch.where(seen == 0, 0, read))


def test_what_only_some_models_have():
    parts = anatomy(sparse(topk_fraction=0.25, topk_at=("attn.q", "resid_post_mlp"), residual_activation="relu"))
    assert parts.kept["0.attn.q"] == 2 and parts.kept["1.mlp.post_act"] is None
    assert parts.obstacles == ("relu on the residual stream", "AbsTopK on the residual stream (resid_post_mlp)")
    assert parts.layers[0].sink is not None and parts.bigram is not None and parts.embed_positions is None
    assert parts.layers[0].scale == 0.5 and parts.layers[0].positions == {}
    parts = anatomy(sparse(position="concat", d_position=3, sink=False, bigram=False, logits_bias=True))
    assert parts.layers[1].positions["mlp"].shape == (6, 3) and parts.embed_positions is None
    assert parts.layers[0].sink is None and parts.bigram is None and parts.logits_bias is not None
    parts = anatomy(gpt2(scale_attn_by_inverse_layer_idx=True))
    assert [layer.scale for layer in parts.layers] == [1 / math.sqrt(4), 1 / math.sqrt(4) / 2]
    assert parts.embed_positions is not None and parts.embed_positions.shape == (6, 12)
    assert set(FED_BY) | set(FED_BY.values()) == set(KINDS)


def test_unknown_parts_are_refused_in_words():
    with pytest.raises(
        ValueError, match="parts of a Runnable are not known; allowed are DenseModel, SparseTransformer"
    ):
        anatomy(Runnable())
    with pytest.raises(ValueError, match=r"'sine' is not known; allowed are .*gelu_new.*relu"):
        activation("sine")

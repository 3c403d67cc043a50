"""Ablation values: means by hand, per position, on disk, and what is refused."""

import numpy as np
import pytest
import torch

from distill.artifact import ArtifactError, save_tensors
from distill.circuits.ablation import Means, MeansMismatchError, NonFiniteError, node_means
from distill.model.sites import Record
from distill.model.transformer import Architecture, SparseTransformer


def recorded(model, tokens):
    tap = Record()
    with torch.no_grad():
        model.run(tokens, tap=tap)
    return tap.values


def test_means_are_those_of_the_recorded_activations(planted, make_windows):
    tokens = make_windows()
    means = node_means(planted, tokens, batch=7)
    values = recorded(planted, tokens)
    assert list(means.values) == list(planted.widths)
    assert means.tokens == tokens.numel() and not means.per_position
    for location, mean in means.values.items():
        torch.testing.assert_close(mean, values[location].mean((0, 1)), atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(means.magnitude[location], values[location].abs().mean((0, 1)), atol=1e-6, rtol=1e-5)


def test_means_per_position(planted, make_windows):
    tokens = make_windows()
    means = node_means(planted, tokens, per_position=True)
    values = recorded(planted, tokens)
    for location in planted.widths:
        torch.testing.assert_close(means.at(location, 5), values[location].mean(0)[:5], atol=1e-6, rtol=1e-5)
    with pytest.raises(ValueError, match="length: 13 tokens.*up to 12"):
        means.at("0.attn.q", 13)


def test_models_with_positions_have_means_per_position():
    model = SparseTransformer.build(
        Architecture(vocab_size=5, context=8, n_layer=1, d_model=8, d_head=4, position="added", bigram=False)
    )
    assert node_means(model, torch.zeros(2, 6, dtype=torch.long)).at("0.mlp.act_in", 6).shape == (6, 8)


def test_at_gives_one_row_without_positions_and_refuses_unknown_places(planted_means):
    assert planted_means.at("0.attn.q", 3).shape == (1, 8)
    with pytest.raises(ValueError, match="no means for '1.attn.q'"):
        planted_means.at("1.attn.q", 3)


def test_memory_maps_of_small_integers_are_taken(planted, make_windows):
    tokens = make_windows()
    same = node_means(planted, tokens.numpy().astype(np.uint16))
    assert same.data == node_means(planted, tokens).data


def test_the_model_is_left_in_its_mode(planted, make_windows):
    planted.train()
    node_means(planted, make_windows())
    assert planted.training


def test_save_and_load(tmp_path, planted_means):
    path = tmp_path / "means.safetensors"
    planted_means.save(path)
    back = Means.load(path, model=planted_means.model, data=planted_means.data)
    for location, value in planted_means.values.items():
        assert torch.equal(back.values[location], value)
        assert torch.equal(back.magnitude[location], planted_means.magnitude[location])
    assert back.head() == planted_means.head()
    with pytest.raises(MeansMismatchError, match="model: .* but other"):
        Means.load(path, model="other")
    with pytest.raises(MeansMismatchError, match="data: .* but other"):
        Means.load(path, data="other")
    save_tensors(path, {}, {"kind": "bridge"})
    with pytest.raises(ArtifactError, match="bridge"):
        Means.load(path)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (4,)])
def test_no_windows_are_refused(planted, shape):
    with pytest.raises(ValueError, match="windows: shape"):
        node_means(planted, np.zeros(shape, dtype=np.int64))


def test_a_broken_model_is_named_by_its_first_broken_place(planted, make_windows):
    with torch.no_grad():
        planted.layers[0].attn_v.weight[0, 0] = float("inf")
    with pytest.raises(NonFiniteError, match=r"^0\.attn\.v: "):
        node_means(planted, make_windows())


def test_a_sink_at_position_0_is_protected(planted, make_windows):
    tokens = make_windows()
    tokens[:, 0] = 6
    assert not node_means(planted, tokens).protect_first
    with torch.no_grad():
        planted.embed_tokens.weight[6] = 50.0
    assert node_means(planted, tokens).protect_first

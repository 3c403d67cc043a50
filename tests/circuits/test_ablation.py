"""Ablation values: means by hand, per position, on disk, and what is refused."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from distill.artifact import ArtifactError, save_tensors
from distill.circuits.ablation import (
    Means,
    MeansMismatchError,
    NonFiniteError,
    cached_means,
    node_means,
    resampled,
    task_means,
    zeros,
)
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


def test_means_in_half_precision_come_back_rounded_and_once_only(tmp_path, planted_means):
    planted_means.save(tmp_path / "whole.safetensors")
    planted_means.save(tmp_path / "half.safetensors", half=True)
    assert (tmp_path / "half.safetensors").stat().st_size < (tmp_path / "whole.safetensors").stat().st_size
    back = Means.load(tmp_path / "half.safetensors")
    for location, mean in planted_means.values.items():
        assert torch.equal(back.values[location], mean.half().float())
        assert torch.equal(back.magnitude[location], planted_means.magnitude[location].half().float())
    back.save(tmp_path / "again.safetensors", half=True)
    again = Means.load(tmp_path / "again.safetensors")
    assert all(torch.equal(again.values[location], value) for location, value in back.values.items())
    location = next(iter(back.values))
    large = replace(back, values={**back.values, location: back.values[location] + 1e5})
    with pytest.raises(ArtifactError, match=f"mean/{location} has values beyond float16"):
        large.save(tmp_path / "large.safetensors", half=True)
    assert not (tmp_path / "large.safetensors").exists()


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


@pytest.mark.parametrize("per_position", [False, True])
def test_task_means_are_over_the_prompts_without_their_padding(planted, make_windows, make_prompts, per_position):
    means = node_means(planted, make_windows(), per_position=per_position)
    batch = make_prompts(5, 3)
    found = task_means(planted, batch, means, rows=3)
    values = recorded(planted, batch.tokens)
    assert found.kind == "task" and found.model == means.model and found.data != means.data
    assert found.tokens == int((batch.last + 1).sum())
    inside = torch.arange(batch.tokens.shape[1]) <= batch.last[:, None]
    for location in planted.widths:
        value = values[location]
        if not per_position:
            torch.testing.assert_close(found.values[location], value[inside].mean(0), atol=1e-6, rtol=1e-5)
            continue
        third = value[:, 2].mean(0)  # every prompt has at least three tokens
        torch.testing.assert_close(found.values[location][2], third, atol=1e-6, rtol=1e-5)
        longest = batch.tokens.shape[1]
        assert torch.equal(found.values[location][longest:], means.values[location][longest:])


def test_zeros(planted_means):
    nothing = zeros(planted_means)
    assert nothing.kind == "zero" and not any(bool(value.any()) for value in nothing.values.values())
    assert nothing.at("0.attn.q", 4).shape == planted_means.at("0.attn.q", 4).shape


@pytest.mark.parametrize("per_position", [False, True])
def test_resampled_values_are_those_of_one_corpus_token_for_all_nodes(
    planted, make_windows, make_prompts, per_position
):
    tokens, batch = make_windows(), make_prompts(4, 0)
    means = node_means(planted, tokens, per_position=per_position)
    drawn = resampled(planted, tokens, batch, means, pool=60, seed=5)
    assert drawn.kind == "resample" and drawn.per_position == per_position
    rows, length = batch.tokens.shape
    joint = torch.cat([drawn.at(location, length) for location in planted.widths], -1)
    values = recorded(planted, tokens)
    corpus = torch.cat([values[location] for location in planted.widths], -1)
    for row, position in ((0, 0), (3, length - 1)):
        found = corpus[:, position] if per_position else corpus.flatten(0, 1)
        assert float((found - joint[row, position]).abs().sum(-1).min()) < 1e-4
    assert not torch.equal(joint[0, 0], joint[1, 0]) or not torch.equal(joint[0, 1], joint[1, 1])
    some = drawn.rows(torch.tensor([2, 1]))
    assert torch.equal(some.at("0.attn.v", 3), drawn.at("0.attn.v", 3)[[2, 1]])
    again = resampled(planted, tokens, batch, means, pool=60, seed=5)
    assert torch.equal(again.index, drawn.index)
    with pytest.raises(ValueError, match="length: 99 tokens"):
        drawn.at("0.attn.v", 99)
    if per_position:
        with pytest.raises(ValueError, match="windows: 3 tokens long"):
            resampled(planted, tokens[:, :3], batch, means)


def test_means_are_measured_once_for_a_model_and_its_windows(tmp_path, planted, make_windows, monkeypatch):
    first = cached_means(planted, make_windows(), tmp_path)
    monkeypatch.setattr("distill.circuits.ablation.node_means", lambda *a, **k: pytest.fail("measured again"))
    again = cached_means(planted, make_windows(), tmp_path)
    assert again.head() == first.head() and again.model == first.model == planted.fingerprint()
    for location, value in first.values.items():
        assert torch.equal(again.values[location], value)
    monkeypatch.undo()
    cached_means(planted, make_windows(1), tmp_path)
    with torch.no_grad():
        planted.embed_tokens.weight[0] += 1
    cached_means(planted, make_windows(), tmp_path)
    assert len(list(tmp_path.iterdir())) == 3


def test_the_kind_of_value_is_kept_on_disk(tmp_path, planted_means):
    zeros(planted_means).save(tmp_path / "zero.safetensors")
    assert Means.load(tmp_path / "zero.safetensors").kind == "zero"

"""What is said of a fit before it starts: counts of the models themselves, arithmetic by hand."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from bridges import BridgeConfig, Bridges, StudentConfig
from bridges.plan import KNOWN, dense_shape, next_steps, plan_fit
from distill.model import DenseModel, SparseTransformer
from distill.training import TrainConfig, sparse_parameters

TRAINING = TrainConfig(steps=10, batch=4, context=12, kept=0.25)
SHAPE = StudentConfig(d_model=24, d_head=8)


def test_counts_are_those_of_models_and_bridges(dense: DenseModel) -> None:
    found = plan_fit(dense, SHAPE.architecture(dense), BridgeConfig(), TRAINING)
    student = SparseTransformer.build(SHAPE.architecture(dense))
    assert found.dense == sum(p.numel() for p in dense.parameters())
    assert found.student == sum(p.numel() for p in student.parameters())
    assert found.nonzeros == sum(round(p.numel() / 4) for p in sparse_parameters(student).values())
    bridges = Bridges(BridgeConfig().shape(dense, student))
    assert found.bridges == sum(p.numel() for p in bridges.parameters()) and found.sites == 5
    assert found.tokens == 10 * 4 * 12
    assert found.bytes["student with gradients and moments"] == 16 * found.student
    assert f"{found.student:,}" in found.describe() and "on one GPU" in found.describe()


def test_operations_by_hand(dense: DenseModel) -> None:
    # Multiply-adds of a pass: 12 D^2 a layer and V D; attention reads 12 tokens, half of them masked, twice.
    layers_d, layers_s = 2 * 12 * 16**2, 2 * 12 * 24**2
    attention_d, attention_s = 2 * 12 * 2 * 16, 2 * 12 * 2 * 24
    forward_d, forward_s = 2 * (layers_d + 29 * 16) + attention_d, 2 * (layers_s + 29 * 24) + attention_s
    half_d, half_s = layers_d + 2 * 29 * 16 + attention_d / 2, layers_s + 2 * 29 * 24 + attention_s / 2
    maps = 3 * 2 * (2 * 5 + 2) * 16 * 24
    expected = 3 * forward_s + forward_d + 3 * half_s + 2 * half_d + maps
    found = plan_fit(dense, SHAPE.architecture(dense), BridgeConfig(), TRAINING)
    assert found.step_operations == pytest.approx(48 * expected)
    stored = plan_fit(dense, SHAPE.architecture(dense), BridgeConfig(), TRAINING, targets=True)
    assert found.step_operations - stored.step_operations == pytest.approx(48 * forward_d)
    alone = BridgeConfig(nmse=0.0, kl_d2s=0.0, kl_s2d=0.0)
    only = plan_fit(dense, SHAPE.architecture(dense), alone, TRAINING).step_operations
    assert only == pytest.approx(48 * (3 * forward_s + forward_d + 3 * 2 * 2 * 16 * 24))


def test_settings_move_the_plan_as_they_should(dense: DenseModel) -> None:
    plain = plan_fit(dense, SHAPE.architecture(dense), BridgeConfig(), TRAINING)
    every = plan_fit(dense, SHAPE.architecture(dense), BridgeConfig(sites="all"), TRAINING)
    again = plan_fit(dense, SHAPE.architecture(dense), BridgeConfig(sites="all", recompute=True), TRAINING)
    assert every.seconds > plain.seconds and again.seconds > every.seconds
    assert again.bytes["activations"] < every.bytes["activations"]
    parts = plan_fit(dense, SHAPE.architecture(dense), BridgeConfig(), replace(TRAINING, accumulate=4))
    assert parts.bytes["activations"] == plain.bytes["activations"] / 4 and parts.seconds == plain.seconds
    half = plan_fit(dense, SHAPE.architecture(dense), BridgeConfig(), replace(TRAINING, precision="bfloat16"))
    assert half.seconds < plain.seconds


def test_gpt2_is_planned_for_without_a_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = dense_shape("gpt2")
    assert (shape.n_layer, shape.d_model, shape.vocab_size, shape.context) == (12, 768, 50257, 1024)
    assert all(parameter.device.type == "meta" for parameter in shape.parameters())
    assert sum(parameter.numel() for parameter in shape.parameters()) == 124_439_808
    assert dense_shape("distilbert/distilgpt2").n_layer == 6 and set(KNOWN) >= {"gpt2-xl"}
    with pytest.raises(ValueError, match=r"dense: the configuration of no/such cannot be read; allowed .* gpt2-xl"):
        dense_shape("no/such")


def test_a_folder_needs_its_configuration_only(tmp_path: Path, dense: DenseModel) -> None:
    dense.hf.config.save_pretrained(tmp_path)
    shape = dense_shape(str(tmp_path))
    assert (shape.n_layer, shape.d_model, shape.vocab_size) == (2, 16, 29)
    plans = [plan_fit(one, SHAPE.architecture(one), BridgeConfig(), TRAINING) for one in (shape, dense)]
    assert plans[0] == plans[1]
    with torch.device("meta"):
        untied = DenseModel(GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=29, n_positions=12,
                                                       tie_word_embeddings=False)))  # fmt: skip
    found = plan_fit(untied, SHAPE.architecture(untied), BridgeConfig(), TRAINING)
    assert found.dense == plans[0].dense + 29 * 16 and found.step_operations == plans[0].step_operations


def test_what_comes_next_names_corpus_and_tasks() -> None:
    said = next_steps(("hf:someone/text",), True, "runs/x", ("ioi", "greater_than"))
    assert "corpus: hf:someone/text, read as a stream" in said
    assert "python recipes/prune_circuit.py --model runs/x --task ioi greater_than" in said
    with pytest.raises(ValueError, match="no_such_task"):
        next_steps((), False, "runs/x", ("no_such_task",))

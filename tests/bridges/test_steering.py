"""Steering through bridges: what is carried, where it is added, what is refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from bridges.maps import Bridges, BridgeShape
from bridges.steering import (
    NODE,
    RANDOM,
    READS,
    carried_direction,
    parse_strengths,
    plot_steering,
    rank_reads,
    read_site,
    steer,
)
from distill.circuits.answers import answer_logits
from distill.circuits.tasks import TaskBatch
from distill.model import Architecture, DenseModel, Record, Replace, SparseTransformer
from distill.model.run import Runnable

WIDTH = 8


def sparse(**options: object) -> SparseTransformer:
    model = SparseTransformer.build(
        Architecture(vocab_size=12, context=6, n_layer=2, d_model=WIDTH, d_head=4, topk_fraction=None, **options)
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(torch.rand(parameter.shape, generator=torch.Generator().manual_seed(1)) + 0.5)
    return model.eval()


def gpt2() -> DenseModel:
    torch.manual_seed(0)
    config = GPT2Config(n_layer=2, n_embd=WIDTH, n_head=2, vocab_size=12, n_positions=6, bos_token_id=0, eos_token_id=0)
    return DenseModel(GPT2LMHeadModel(config).eval())


@pytest.fixture
def batch() -> TaskBatch:
    tokens = torch.randint(12, (8, 5), generator=torch.Generator().manual_seed(0))
    last = torch.tensor([4, 3, 4, 2] * 2)
    rows = torch.arange(8)
    answer = torch.where(rows < 4, 1, 2)
    return TaskBatch(
        tokens=tokens,
        attention_mask=(torch.arange(5) <= last[:, None]).long(),
        last=last,
        answer=answer,
        other=3 - answer,
        orientation=torch.where(rows < 4, 1.0, -1.0),
        labels=(rows >= 4).long(),
    )


@pytest.mark.parametrize("model", [sparse(), gpt2()], ids=["rms", "layer"])
@pytest.mark.parametrize("place", ["0.attn.act_in", "1.mlp.act_in"])
def test_all_channels_over_an_identity_bridge_give_the_counterfactual_read(
    model: Runnable, place: str, batch: TaskBatch
) -> None:
    bridges = Bridges.identity(2, WIDTH)
    nodes = [f"{place}.{channel}" for channel in range(WIDTH)]
    found = steer(model, model, bridges, batch, nodes, (0.0, 1.0), controls=2)
    record = Record([place])
    with torch.no_grad():
        model.run(batch.tokens, tap=record)
        turned = torch.cat(record.values[place].chunk(2)[::-1])
        rows = torch.arange(8)
        expected = answer_logits(model, batch, Replace({place: turned})).softmax(-1)[rows, batch.other]
        plain = answer_logits(model, batch).softmax(-1)[rows, batch.other]
    assert found.probability[NODE][0] == pytest.approx((float(plain.mean()), float(expected.mean())), abs=1e-6)
    assert all(run[0] == pytest.approx(float(plain.mean())) for run in found.probability[RANDOM])
    assert len(found.probability[RANDOM]) == 2 and len(found.probability[READS]) == 1
    with torch.no_grad():
        ceiling = answer_logits(model, batch).softmax(-1)[torch.arange(8), batch.answer].mean()
    assert found.ceiling == pytest.approx(float(ceiling), abs=1e-6)


def test_what_one_channel_is_in_the_other_model(batch: TaskBatch) -> None:
    dense, student = gpt2(), sparse(sink=False)
    bridges = Bridges(BridgeShape(n_layer=2, d_dense=WIDTH, d_sparse=WIDTH, k=WIDTH), seed=3)
    direction = carried_direction(dense, student, bridges, batch, "1.mlp.act_in.5")
    read = torch.arange(5) <= batch.last[:, None]
    with torch.no_grad():
        stream_d, stream_s = (model.run(batch.tokens, stop="1.resid_mid")[read] for model in (dense, student))
    rho_d = (stream_d.var(-1, correction=0) + 1e-5).sqrt().mean()
    rho_s = (stream_s.square().mean(-1) + 1e-5).sqrt().mean()
    column = bridges.decoder("1.resid_mid").weight[:, 5] / student.layers[1].mlp_norm.weight[5]
    gain = dense.hf.transformer.h[1].ln_2.weight
    torch.testing.assert_close(direction, (rho_s / rho_d * gain * (column - column.mean())).detach(), rtol=1e-4, atol=0)


def test_the_only_node_that_matters_stands_at_an_end_of_the_ranking(batch: TaskBatch) -> None:
    student = sparse()
    with torch.no_grad():
        for layer in student.layers:
            for weight in (layer.attn_out.weight, layer.mlp_out.weight):
                weight.zero_()
        mlp = student.layers[1]
        mlp.mlp_in.weight[:, [0, 1, 2, 4, 5, 6, 7]] = 0
        mlp.mlp_out.weight.normal_(generator=torch.Generator().manual_seed(0))
    ranked = rank_reads(student, batch)
    assert len(ranked) == 4 * WIDTH
    # All others have no effect at all: it comes before or behind them, as its effect has one sign or the other.
    assert "1.mlp.act_in.3" in (ranked[0], ranked[-1])


def test_controls_are_as_long_and_seeded(batch: TaskBatch) -> None:
    dense, student = gpt2(), sparse()
    bridges = Bridges(BridgeShape(n_layer=2, d_dense=WIDTH, d_sparse=WIDTH, k=WIDTH))
    nodes = ("0.mlp.act_in.1", "1.attn.act_in.2")
    one = steer(dense, student, bridges, batch, nodes, (0.0, 2.0), controls=3, seed=1)
    again = steer(dense, student, bridges, batch, nodes, (0.0, 2.0), controls=3, seed=1)
    other = steer(dense, student, bridges, batch, nodes, (0.0, 2.0), controls=3, seed=2)
    assert one == again and one.probability[RANDOM] != other.probability[RANDOM]
    assert one.probability[NODE] == other.probability[NODE] and one.ratio > 0
    assert all(
        0 < value < 1 for runs in (*one.probability.values(), *one.share.values()) for run in runs for value in run
    )
    json.dumps(one.to_json())


def test_what_is_refused(batch: TaskBatch) -> None:
    dense, student = gpt2(), sparse()
    bridges = Bridges(BridgeShape(n_layer=2, d_dense=WIDTH, d_sparse=WIDTH, k=WIDTH))
    with pytest.raises(ValueError, match=r"node: 0\.attn\.q\.1 is no read"):
        read_site("0.attn.q.1")
    with pytest.raises(ValueError, match=r"node: 0\.attn\.act_in\.8 is none of the student's residual channels"):
        steer(dense, student, bridges, batch, ["0.attn.act_in.8"], (1.0,))
    with pytest.raises(ValueError, match="allowed are one or more, each once"):
        steer(dense, student, bridges, batch, [], (1.0,))
    with pytest.raises(ValueError, match="pairs of unequal length"):
        steer(dense, student, bridges, replace(batch, last=torch.arange(8) // 2 + 1), ["0.attn.act_in.1"], (1.0,))
    with torch.no_grad():
        student.layers[0].attn_norm.weight[2] = 0
    with pytest.raises(ValueError, match="reads nothing"):
        steer(dense, student, bridges, batch, ["0.attn.act_in.2"], (1.0,))


def test_strengths() -> None:
    assert parse_strengths("0:1:3") == (0.0, 0.5, 1.0)
    assert parse_strengths("-1:1:2") == (-1.0, 1.0)
    for text in ("", "0:1", "0:1:1", "1:1:3", "0:1:3:4", "0:inf:3", "a:1:2", "0:1:-3"):
        with pytest.raises(ValueError, match="strength: got"):
            parse_strengths(text)


def test_a_figure_is_drawn(batch: TaskBatch, tmp_path: Path) -> None:
    dense, student = gpt2(), sparse()
    bridges = Bridges(BridgeShape(n_layer=2, d_dense=WIDTH, d_sparse=WIDTH, k=WIDTH))
    found = steer(dense, student, bridges, batch, ["0.attn.act_in.1"], (0.0, 0.5, 1.0), controls=2)
    plot_steering({"one": found, "two": found}, tmp_path / "steering.png")
    assert (tmp_path / "steering.png").read_bytes()[1:4] == b"PNG"

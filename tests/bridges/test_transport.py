import json
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import bridges.transport as transport
from bridges import Bridges, Comparison, Lineup, bridged_subspace, residual_means
from bridges.compare import CompareConfig
from bridges.lineup import STUDENT, TEACHER
from bridges.metrics import recorded
from bridges.transport import (
    CHANNELS,
    PRINCIPAL,
    active_channels,
    add_subspaces,
    encode_mask_decode,
    masked_test,
    random_channels,
    spread,
)
from distill.circuits.ablation import node_means
from distill.circuits.answers import Calibration
from distill.circuits.circuit import Circuit
from distill.circuits.subject import Subject
from distill.circuits.tasks import TaskBatch, load_task, task_loss
from distill.data.tokens import train_tokenizer
from distill.model import DenseModel, SparseTransformer, residual_sites

SITES = residual_sites(2)


@pytest.fixture
def batch(windows: Tensor) -> TaskBatch:
    """Six prompts of differing lengths with made-up answers."""
    last = torch.tensor([4, 5, 6, 7, 8, 9])
    return TaskBatch(
        tokens=windows[:, :10],
        attention_mask=(torch.arange(10) <= last[:, None]).long(),
        last=last,
        answer=torch.arange(6),
        other=torch.arange(6) + 7,
        orientation=torch.ones(6),
        labels=torch.zeros(6, dtype=torch.int64),
    )


def everywhere(mask: Tensor) -> dict[str, Tensor]:
    return dict.fromkeys(SITES, mask)


def test_spread_windows_reach_from_the_first_to_the_last() -> None:
    sample = torch.arange(300)[:, None].repeat(1, 3)
    assert spread(sample, 4)[:, 0].tolist() == [0, 100, 199, 299]
    assert spread(sample)[-1, 0] == 299 and len(spread(sample)) == 128
    assert torch.equal(spread(sample[:5]), sample[:5])


def test_encoder_means_are_those_of_the_run(dense: DenseModel, bridges: Bridges, windows: Tensor) -> None:
    means = residual_means(dense, windows[:, :-1], bridges=bridges, batch=4)
    with torch.no_grad():
        codes = bridges.encode("1.resid_mid", recorded(dense, windows[:, :-1])[1]["1.resid_mid"])
    torch.testing.assert_close(means.encoded_at("1.resid_mid", 12), codes.mean(0), rtol=1e-4, atol=1e-5)
    assert means.encoded_at("1.resid_mid", 5).shape == (5, 24)
    with pytest.raises(ValueError, match="length: 13 tokens"):
        means.encoded_at("1.resid_mid", 13)
    with pytest.raises(ValueError, match="allowed are means measured with bridges"):
        residual_means(dense, windows[:, :-1]).encoded_at("1.resid_mid", 5)


@torch.no_grad()
def test_masked_channels_are_written_out_by_hand(dense: DenseModel, bridges: Bridges, windows: Tensor) -> None:
    means = residual_means(dense, windows[:, :-1], bridges=bridges)
    site, mask = "0.resid_mid", torch.arange(24) % 3 == 0
    stream = recorded(dense, windows[:, :5])[1][site]
    found = encode_mask_decode(bridges, site, stream, mask, means)
    code = bridges.encode(site, stream)[2, 4] - means.encoded[site][4]
    expected = means.values[site][4] + sum(code[c] * bridges.decoder_matrix(site)[:, c] for c in range(0, 24, 3))
    torch.testing.assert_close(found[2, 4], expected, rtol=1e-4, atol=1e-4)
    kept = encode_mask_decode(bridges, site, stream, mask, replace(means, protect_first=True))
    assert torch.equal(kept[:, 0], stream[:, 0]) and torch.equal(kept[:, 1:], found[:, 1:])


def test_identity_bridges_lose_nothing_and_no_channels_leave_the_mean(dense: DenseModel, batch: TaskBatch) -> None:
    identity = Bridges.identity(2, 16)
    means = residual_means(dense, batch.tokens, bridges=identity)
    half = everywhere(torch.arange(16) < 5)
    outcomes = masked_test(dense, batch, identity, half, means, controls=[everywhere(torch.arange(16) >= 0), half])
    assert tuple(outcome.site for outcome in outcomes) == SITES
    rows = torch.arange(6)
    for outcome in outcomes:
        x = means.at(outcome.site, 10).expand(6, -1, -1)
        with torch.no_grad():
            logits = dense.run(batch.tokens, start=outcome.site, residual=x)[rows, batch.last]
        assert outcome.ceiling == pytest.approx(outcome.loss_full, rel=1e-3)
        assert outcome.loss_empty == pytest.approx(float(task_loss(logits, batch).mean()), rel=1e-3)
        assert outcome.controls == {CHANNELS: pytest.approx((outcome.loss_full, outcome.loss), rel=1e-3)}
        assert outcome.dimension == 5 and outcome.share == 5 / 16
        found = json.loads(json.dumps(outcome.to_json()))
        assert found["test"] == "encode_mask_decode" and found["ceiling"] == outcome.ceiling
        assert "all channels" in outcome.line() and outcome.verdict == "too few controls"


def test_a_dead_channel_is_not_active(twin: SparseTransformer, windows: Tensor) -> None:
    with torch.no_grad():
        twin.embed_tokens.weight[:, 3] = 0
        for layer in twin.layers:
            for linear in (layer.attn_out, layer.mlp_out):
                linear.weight[3] = 0
                # A constant is no variation either.
                linear.bias[3] = 5.0
    for active in active_channels(twin, windows[:, :-1]).values():
        assert active.nonzero()[:, 0].tolist() == [c for c in range(16) if c != 3]


def test_random_channels_are_active_as_many_as_live_and_seeded() -> None:
    live = {"a": torch.arange(20) < 4, "b": torch.arange(20) < 7, "c": torch.arange(20) < 0}
    active = {"a": torch.arange(20) >= 8, "b": torch.arange(20) >= 15, "c": torch.arange(20) >= 8}
    one, two, three = (list(random_channels(live, active, 30, seed=seed)) for seed in (0, 0, 1))
    for drawn, again in zip(one, two, strict=True):
        assert [int(mask.sum()) for mask in drawn.values()] == [4, 5, 0]
        assert all(bool(active[site][mask].all()) for site, mask in drawn.items())
        assert all(torch.equal(drawn[site], again[site]) for site in live)
    assert any(not torch.equal(a["a"], b["a"]) for a, b in zip(one, three, strict=True))
    # Each of the twelve channels takes its turn.
    assert torch.stack([drawn["a"] for drawn in one]).any(0).tolist() == active["a"].tolist()


def test_random_channels_overlap_across_sites_as_the_live_ones_do() -> None:
    live = {"a": torch.arange(20) < 4, "b": (torch.arange(20) >= 2) & (torch.arange(20) < 8)}
    active = dict.fromkeys(live, torch.ones(20, dtype=torch.bool))
    assert all(int((drawn["a"] & drawn["b"]).sum()) == 2 for drawn in random_channels(live, active, 20, seed=0))


def test_subspaces_are_added_for_tasks_with_a_circuit_that_the_dense_model_can_do(
    dense: DenseModel,
    student: SparseTransformer,
    bridges: Bridges,
    windows: Tensor,
    batch: TaskBatch,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    nodes = {location: torch.zeros(width, dtype=torch.bool) for location, width in student.widths.items()}
    nodes["0.mlp.resid_delta"][:2] = True
    circuit = Circuit(
        model="", model_name=STUDENT, task="", nodes=nodes, scores={}, means=node_means(student, windows[:, :-1]),
        calibration=Calibration(), losses={}, target=0.15,
    )  # fmt: skip
    tokenizer = train_tokenizer(["a = b"], 257)
    subjects = [
        Subject(name=name, model=model, tokenizer=tokenizer, sample=windows, means=node_means(model, windows[:, :-1]))
        for name, model in ((TEACHER, dense), (STUDENT, student))
    ]
    lineup = Lineup(subjects=subjects, bridges=bridges)
    tasks = [replace(load_task("for_while"), name=name) for name in ("does", "cannot", "none")]
    rows = {task.name: {TEACHER: {"loss_full": 0.65 if task.name == "cannot" else 0.1}} for task in tasks}
    comparison = Comparison(record={"tasks": rows}, circuits={(name, STUDENT): circuit for name in ("does", "cannot")})
    asked = []
    monkeypatch.setattr(transport, "encode", lambda *a, **k: asked.append(a[2:]) or batch)
    monkeypatch.setattr(transport, "PAIRS", 2)
    monkeypatch.setattr(transport, "SITE_CONTROLS", 5)
    config = CompareConfig(subspaces=19)
    found = json.loads(json.dumps(add_subspaces(comparison, lineup, tasks, config).record["tasks"]))
    assert asked == [("test", 2, config.prune.seed)]
    assert found["cannot"]["bridge"] is None and found["none"]["bridge"] is None
    tests = found["does"]["bridge"]
    assert len(tests) == 2 * 6 + 5 and [test["test"] for test in tests[12:]] == ["encode_mask_decode"] * 5
    for test in tests[:12]:
        assert len(test["controls"]) == (19 if test["site"] == "all" else 5)
        assert len(test["families"][CHANNELS]) == len(test["controls"]) and PRINCIPAL in test["other"]
    assert {len(test["families"][CHANNELS]) for test in tests[12:]} == {5}
    assert tests[5]["site"] == "all" and set(tests[5]["p"]) == {"random", CHANNELS}
    live = {site: torch.arange(24) < (2 if site in SITES[2:] else 0) for site in SITES}
    assert tests[5]["dimension"] == bridged_subspace(bridges, live)["final_resid"].shape[1] == 2
    without = replace(lineup, bridges=None)
    assert add_subspaces(comparison, without, tasks, config).record["tasks"]["does"]["bridge"] is None

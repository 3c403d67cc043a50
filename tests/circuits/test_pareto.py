"""A Pareto curve: a row for each target, sizes that never rise with it, files that say how it was made."""

import json

import pytest
import torch

from distill.circuits import Circuit, PruneConfig, load_task
from distill.circuits.ablation import node_means
from distill.circuits.pareto import pareto

QUICK = PruneConfig(steps=24, val_pairs=8, verify_pairs=8)


@pytest.fixture
def weak(make_planted):
    """The planted model, which answers without much certainty."""
    model = make_planted(0, stray=0.1)
    with torch.no_grad():
        model.unembed.weight *= 0.2
    return model


@pytest.fixture
def curve_of(tmp_path, weak, make_windows, make_task_file, word_tokenizer):
    task = load_task(make_task_file(tmp_path / "opener.jsonl"))
    means = node_means(weak, make_windows())

    def made(targets, config=QUICK):
        return pareto(weak, task, word_tokenizer, means, targets, config, model_name="weak")

    return made


def test_from_one_search_a_circuit_for_each_target_in_reach(curve_of, tmp_path, weak):
    curve = curve_of((0.1, 1e-7, 0.6, 0.3))
    assert [row["target"] for row in curve.rows] == [0.6, 0.3, 0.1, 1e-7]
    assert "1e-07 nats is out of reach" in curve.rows[-1]["reason"] and set(curve.circuits) == {0.6, 0.3, 0.1}
    found = curve.rows[:-1]
    assert all(row["circuit"] <= row["target"] and not row["reason"] for row in found)
    sizes = [row["edges_pruned"] for row in found]
    assert sizes == sorted(sizes) and sizes[-1] == 4
    curve.save(tmp_path)
    record = json.loads((tmp_path / "opener.weak.pareto.json").read_text())
    assert [row["target"] for row in record["rows"]] == [0.6, 0.3, 0.1, 1e-7]
    assert record["config"]["steps"] == 24 and record["config"]["targets"] == [0.1, 1e-7, 0.6, 0.3]
    assert (tmp_path / "opener.weak.pareto.png").read_bytes().startswith(b"\x89PNG")
    circuit = Circuit.load(tmp_path / "opener.weak.0.3.circuit.safetensors")
    assert circuit.model == weak.fingerprint() and circuit.target == 0.3
    lines = curve.table().splitlines()
    assert len(lines) == 6 and "out of reach" in lines[-1]


@pytest.mark.parametrize(
    ("targets", "settings", "words"),
    [
        ((), {}, r"targets: got \[\]; allowed: one or more different numbers"),
        ((0.2, 0.2), {}, "targets: got"),
        ((0.2, -1.0), {}, "target: got -1.0"),
        ((0.2,), {"relative": True}, "relative: got True; allowed: targets as they are"),
    ],
)
def test_bad_targets_are_named(curve_of, targets, settings, words):
    with pytest.raises(ValueError, match=words):
        curve_of(targets, PruneConfig(**settings))

"""A sweep: a record and a circuit for each model, task and seed; what lies there is taken, if it is the same."""

import json
from dataclasses import replace

import pytest
import torch

from distill.circuits import Circuit, PruneConfig
from distill.circuits import sweep as sweeps
from distill.circuits.circuit import CircuitMismatchError
from distill.circuits.sweep import SweepConfig, sweep, table


@pytest.fixture
def config(tmp_path, make_planted, make_folder, make_task_file):
    model = make_folder(tmp_path / "planted", make_planted(0, stray=0.1))
    task = make_task_file(tmp_path / "opener.jsonl")
    prune = PruneConfig(steps=16, val_pairs=8, verify_pairs=8)
    return SweepConfig(models=(str(model),), tasks=(str(task),), seeds=(0, 1), prune=prune, checks=False, device="cpu")


def test_one_record_and_one_circuit_a_job(config, tmp_path, planted_names, monkeypatch):
    records = sweep(config, tmp_path / "out")
    assert [record["name"] for record in records] == ["opener.planted.0", "opener.planted.1"]
    for record in records:
        circuit = Circuit.load(tmp_path / "out" / f"{record['name']}.circuit.safetensors")
        assert set(circuit.node_names) <= set(planted_names) and circuit.model == record["fingerprint"]
        assert record["nodes"] == circuit.n_nodes and record["circuit"] <= record["target"]
    assert json.loads((tmp_path / "out" / "sweep.json").read_text())["records"] == records
    assert all(record["name"] in table(records) for record in records)

    def never(*given, **named):
        raise AssertionError("pruned again")

    monkeypatch.setattr(sweeps, "prune", never)
    assert sweep(config, tmp_path / "out") == records


def test_a_sweep_that_was_broken_off_goes_on(config, tmp_path):
    first = sweep(replace(config, seeds=(1,)), tmp_path / "out")
    assert sweep(config, tmp_path / "out")[1] == first[0]


def test_what_was_made_otherwise_is_not_taken(config, tmp_path, make_planted, make_folder):
    config = replace(config, seeds=(0,))
    sweep(config, tmp_path / "out")
    with pytest.raises(ValueError, match=r"made with other settings \(steps 16, now 17\); choose another folder"):
        sweep(replace(config, prune=replace(config.prune, steps=17)), tmp_path / "out")
    make_folder(tmp_path / "planted", make_planted(1))
    with pytest.raises(CircuitMismatchError, match="belongs to a model with fingerprint"):
        sweep(config, tmp_path / "out")


def test_a_target_out_of_reach_is_a_reason(config, tmp_path, make_planted, make_folder):
    model = make_planted(0)
    with torch.no_grad():
        model.unembed.weight *= 0.1
    make_folder(tmp_path / "planted", model)
    config = replace(config, seeds=(0,), prune=replace(config.prune, target=1e-6, steps=2))
    (record,) = sweep(config, tmp_path / "out")
    assert "1e-06 nats is out of reach" in record["reason"] and record["nodes"] is None
    assert not list((tmp_path / "out").glob("*.circuit.safetensors"))
    assert "out of reach" in table([record])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"models": ()}, r"models: got \[\]; allowed are one or more"),
        ({"seeds": (1, 1)}, r"seeds: got \[1, 1\]"),
        ({"models": ("a/one", "zwei", "b/zwei")}, "models: two are called 'zwei'"),
    ],
)
def test_bad_settings_are_named(config, change, words):
    with pytest.raises(ValueError, match=words):
        replace(config, **change)

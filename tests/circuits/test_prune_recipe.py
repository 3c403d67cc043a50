"""Bad input on the command line of the recipe that prunes: one line, status 2, nothing written."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from distill.circuits import search
from distill.circuits.prune import LABEL_BETTER

RECIPE = Path(__file__).parents[2] / "recipes" / "prune_circuit.py"


@pytest.fixture(scope="module")
def recipe():
    spec = importlib.util.spec_from_file_location("prune_circuit", RECIPE)
    assert spec is not None and spec.loader is not None
    # A dataclass looks its module up by name.
    sys.modules["prune_circuit"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture
def place(tmp_path, make_planted, make_folder, make_task_file):
    """A folder with the planted model, a weak reading of its answers, and pairs of prompts as a task file."""
    model = make_planted(0)
    with torch.no_grad():
        model.unembed.weight *= 0.1
    make_folder(tmp_path / "model", model)
    make_task_file(tmp_path / "opener.jsonl")
    (tmp_path / "empty.jsonl").write_text("")
    return tmp_path


@pytest.fixture
def refused(recipe, place, capsys):
    """The one line that the recipe prints about its options."""

    def ask(*words: str, task: str = "opener.jsonl") -> str:
        argv = ["--model", place / "model", "--task", place / task, "--out", place / "out", *words]
        assert recipe([str(word) for word in argv]) == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and not (place / "out").exists()
        return lines[0]

    return ask


FEW = ("--prune.steps", "4", "--no-checks")


def test_a_faithful_target_below_the_model_says_what_it_reaches(refused):
    line = refused("--target", "0.01", "--no-relative", "--prune.objective", "faithful", *FEW)
    assert "target: 0.01 nats is below what the full model reaches, 0.1" in line and "the paper objective" in line


def test_a_target_that_nothing_reaches_says_what_was_reached(refused):
    line = refused("--target", "1e-6", "--no-relative", *FEW)
    assert "target: 1e-06 nats is out of reach: the full model has 0.1" in line and "the best circuit found" in line


def test_an_empty_task(refused):
    assert "empty.jsonl" in refused(task="empty.jsonl")


def test_activations_that_are_not_finite(refused, place, make_planted):
    model = make_planted(0)
    with torch.no_grad():
        model.layers[0].attn_q.bias[3] = float("nan")
    model.save_pretrained(place / "model")
    assert "0.attn.q" in refused(*FEW) and "finite"


def test_too_little_memory(refused, monkeypatch):
    def screen(*given):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(search.Search, "screen", screen)
    assert "rows: 128 pairs of prompts at once exceed the device's memory; 128 fit" in refused(*FEW)


def test_better_than_the_model_is_allowed_and_labelled(recipe, place, capsys):
    argv = ["--model", place / "model", "--task", place / "opener.jsonl", "--out", place / "out", "--no-relative"]
    assert recipe([str(word) for word in [*argv, "--target", "0.12", "--prune.margin", "0", *FEW]]) == 0
    assert LABEL_BETTER in capsys.readouterr().out
    row = json.loads((place / "out" / "comparison.json").read_text())["tasks"]["opener"]
    assert row["model"]["loss_circuit"] < row["target"] == 0.12 < row["model"]["loss_full"]

"""A circuit's model and task are found by what its file and the folder around it say."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from distill.artifact import Provenance, fresh_folder
from distill.circuits.answers import Calibration
from distill.circuits.circuit import Circuit, CircuitMismatchError
from distill.circuits.masks import all_nodes
from distill.circuits.origin import find_subject, find_subjects, find_task, labels
from distill.circuits.subject import load_subject


@pytest.fixture(scope="module")
def shipped():
    """A circuit of a shipped model, under a name that says nothing."""
    torch.set_num_threads(1)
    subject = load_subject("dense_gpt2")
    return Circuit(
        model=subject.model.fingerprint(), model_name="mine", task="for_while",
        nodes=all_nodes(subject.model.widths, keep=False), scores={}, means=subject.means, calibration=Calibration(),
        losses={}, target=0.15,
    )  # fmt: skip


def test_a_shipped_model_is_found_by_its_fingerprint(shipped, tmp_path):
    subject = find_subject(shipped, tmp_path / "a.circuit.safetensors")
    assert subject.model.fingerprint() == shipped.model and subject.name == "mine"


def test_the_manifest_beside_a_circuit_says_which_models_there_were(shipped, tmp_path):
    config = {"model": "no/such/folder", "dense": "dense_gpt2", "task": ["for_while"]}
    made = Provenance(kind="report", command="a recipe", config=config, seed=0, data=None)
    with fresh_folder(tmp_path / "out", made):
        pass
    file = tmp_path / "out" / "a.circuit.safetensors"
    assert find_subject(shipped, file).model.fingerprint() == shipped.model
    (tmp_path / "out" / "manifest.json").write_text(json.dumps({"kind": "report"}))
    with pytest.raises(ValueError, match="format_version"):
        find_subject(shipped, file)


def test_a_model_that_is_nowhere_is_asked_for(shipped, tmp_path):
    stray = replace(shipped, model="0" * 64)
    with pytest.raises(CircuitMismatchError, match="is that model; say where it is with --model"):
        find_subject(stray, tmp_path / "a.circuit.safetensors", models=("dense_gpt2",))
    with pytest.raises(ValueError, match="no/such"):
        find_subject(shipped, tmp_path / "a.circuit.safetensors", models=("no/such",))


def test_models_of_several_circuits_are_loaded_once(shipped, tmp_path):
    file = tmp_path / "a.circuit.safetensors"
    found = find_subjects([shipped, shipped], [file, file], models=("dense_gpt2",))
    assert list(found) == [shipped.model]


def test_tasks_are_found_by_name_and_controls_too(shipped, tmp_path):
    assert find_task(shipped).name == "for_while"
    assert find_task(replace(shipped, task="for_while_nonsense")).name == "for_while_nonsense"
    assert find_task(replace(shipped, task="for_while_shuffled3")).name == "for_while_shuffled3"
    own = tmp_path / "own.jsonl"
    own.write_text(json.dumps({"clean": "a", "corrupt": "b", "answer": "c", "other": "d"}) + "\n")
    assert find_task(replace(shipped, task="own"), str(own)).name == "own"
    with pytest.raises(ValueError, match="'own' is no built-in task; name the file of its pairs with --task"):
        find_task(replace(shipped, task="own"))


def test_names_are_as_long_as_they_have_to_be():
    files = [Path(f"/runs/{name}.circuit.safetensors") for name in ("x/a/one", "y/a/one", "two")]
    assert labels(files) == ["x.a.one", "y.a.one", "two"]
    assert labels(files[1:]) == ["one", "two"]
    assert labels([files[0], files[0]]) == ["one", "one"]

"""The promise for file formats: each file says its version, and a version that is not known is refused by name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import distill
from distill.artifact import (
    FORMAT_VERSION,
    ArtifactError,
    Provenance,
    fresh_folder,
    read_manifest,
    read_record,
    write_record,
)
from distill.circuits import Circuit, Means
from distill.circuits.answers import Calibration
from distill.circuits.viewer.labels import read_labels, write_labels
from distill.data.tokens import load_ids, save_ids
from distill.model import Architecture, SparseTransformer
from distill.model.compact import load_compact
from distill.model.linear_path import LinearPath

DOCUMENT = Path(distill.__file__).parent / "FORMATS.md"
TINY = Architecture(vocab_size=31, context=16, n_layer=1, d_model=16, d_head=4)


def means(model: SparseTransformer) -> Means:
    zeros = {location: torch.zeros(width) for location, width in model.widths.items()}
    return Means(values=zeros, magnitude=zeros, model=model.fingerprint(), data="d", tokens=1)


def write_circuit(path: Path) -> Path:
    model = SparseTransformer.build(TINY)
    nodes = {location: torch.ones(width, dtype=torch.bool) for location, width in model.widths.items()}
    circuit = Circuit(
        model=model.fingerprint(),
        model_name="m",
        task="t",
        nodes=nodes,
        scores={location: mask.float() for location, mask in nodes.items()},
        means=means(model),
        calibration=Calibration(),
        losses={},
        target=0.15,
    )
    return circuit.save(path / "a.circuit.safetensors")


def write_means(path: Path) -> Path:
    means(SparseTransformer.build(TINY)).save(path / "means.safetensors")
    return path / "means.safetensors"


def write_ids(path: Path) -> Path:
    save_ids(path / "ids.safetensors", np.arange(5), vocab_size=31)
    return path / "ids.safetensors"


def write_compact(path: Path) -> Path:
    SparseTransformer.build(TINY).save_compact(path)
    return path / "model.sparse.safetensors"


TENSOR_FILES: list[tuple[Callable[[Path], Path], Callable[[Path], Any]]] = [
    (write_circuit, Circuit.load),
    (write_means, Means.load),
    (write_ids, load_ids),
    (write_compact, load_compact),
]


def restamp(path: Path, version: object) -> None:
    """The same tensors under another version."""
    with safe_open(path, framework="pt") as file:
        head = json.loads(file.metadata()["distill"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    assert head["format_version"] == FORMAT_VERSION
    save_file(tensors, path, metadata={"distill": json.dumps({**head, "format_version": version})})


@pytest.mark.parametrize(("write", "load"), TENSOR_FILES)
@pytest.mark.parametrize(
    ("version", "message"),
    [
        (FORMAT_VERSION + 1, "is newer than"),
        (0, "format_version 0, allowed are"),
        ("1", "format_version '1'"),
        (None, "None"),
    ],
)
def test_tensor_files_of_unknown_versions_are_refused_by_name(
    tmp_path: Path, write: Any, load: Any, version: object, message: str
) -> None:
    path = write(tmp_path)
    load(path)
    restamp(path, version)
    with pytest.raises(ArtifactError) as error:
        load(path)
    assert str(path) in str(error.value) and message in str(error.value)


@pytest.mark.parametrize("kind", ["model", "tokens", "circuit", "bridge", "report", "run"])
def test_folders_of_unknown_versions_are_refused_by_name(tmp_path: Path, kind: str) -> None:
    provenance = Provenance(kind=kind, command="test", config={}, seed=None, data=None)
    with fresh_folder(tmp_path / "folder", provenance) as place:
        (place / "file.txt").write_text("text")
    manifest = tmp_path / "folder" / "manifest.json"
    known = read_manifest(tmp_path / "folder", kind)
    assert known["format_version"] == FORMAT_VERSION
    for version, message in ((FORMAT_VERSION + 1, "is newer than"), (-1, "format_version -1, allowed are")):
        manifest.write_text(json.dumps({**known, "format_version": version}))
        with pytest.raises(ArtifactError) as error:
            read_manifest(tmp_path / "folder", kind)
        assert str(manifest) in str(error.value) and message in str(error.value)


def test_the_document_speaks_of_the_version_there_is() -> None:
    text = DOCUMENT.read_text()
    assert f"Format version: **{FORMAT_VERSION}**" in text
    for name in (
        "manifest.json",
        ".circuit.safetensors",
        "model.sparse.safetensors",
        "means.safetensors",
        "viz_data.pt",
    ):
        assert name in text, name


RECORDS: dict[str, tuple[Callable[[Path], object], Callable[[Path], object]]] = {
    "a.labels.json": (
        lambda path: write_labels(path.with_name("a.circuit.safetensors"), {"0.attn.q.1": "one"}),
        lambda path: read_labels(path.with_name("a.circuit.safetensors")),
    ),
    "linear_path.json": (lambda path: LinearPath(other=0.5).save(path), LinearPath.load),
}


@pytest.mark.parametrize("name", RECORDS)
def test_records_say_their_version_and_refuse_a_newer_one(name: str, tmp_path: Path) -> None:
    write, read = RECORDS[name]
    path = tmp_path / name
    write(path)
    content = json.loads(path.read_text())
    assert content["format_version"] == FORMAT_VERSION
    first = read(path)
    path.write_text(json.dumps({key: value for key, value in content.items() if key != "format_version"}))
    assert read(path) == first  # of a time when there was none
    path.write_text(json.dumps(content | {"format_version": FORMAT_VERSION + 1}))
    with pytest.raises(ArtifactError, match=rf"{name}: format {FORMAT_VERSION + 1} is newer"):
        read(path)


def test_a_record_is_an_object_of_a_whole_version(tmp_path: Path) -> None:
    write_record(tmp_path / "a.json", {"x": 1})
    assert read_record(tmp_path / "a.json", what="thing") == {"x": 1}
    for content in ("[]", '{"format_version": 0}', '{"format_version": "1"}', '{"format_version": true}'):
        (tmp_path / "a.json").write_text(content)
        with pytest.raises(ArtifactError, match=r"a\.json"):
            read_record(tmp_path / "a.json", what="thing")

"""A person's own words for the nodes of a circuit, kept beside its file: {name}.labels.json, {node: text}."""

from collections.abc import Mapping
from pathlib import Path

from distill.artifact import ArtifactError, read_record, write_record
from distill.circuits.circuit import SUFFIX
from distill.model.sites import split_node

ENDING = ".labels.json"


def labels_path(circuit: str | Path) -> Path:
    """Where the labels of a circuit's file are kept."""
    path = Path(circuit)
    return path.with_name(path.name.removesuffix(SUFFIX) + ENDING)


def read_labels(circuit: str | Path) -> dict[str, str]:
    """The labels beside a circuit's file, {} where there are none. ArtifactError for a file that holds no labels."""
    path = labels_path(circuit)
    if not path.is_file():
        return {}
    found = read_record(path, what="labels")
    if not all(isinstance(text, str) for text in found.values()):
        raise ArtifactError(f"{path}: holds no labels; allowed is one object, names of nodes to texts")
    for name in found:
        try:
            split_node(name)
        except ValueError as error:
            raise ArtifactError(f"{path}: {error}") from error
    return found


def write_labels(circuit: str | Path, labels: Mapping[str, str]) -> Path:
    """Writes labels beside a circuit's file; returns the path."""
    path = labels_path(circuit)
    write_record(path, labels, seal=False)  # people write in it
    return path

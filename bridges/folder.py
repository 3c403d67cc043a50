"""The folder of a student with its bridges, which loads by its path.

    model/         the student, a Hugging Face model folder with a manifest of its own
    bridges/       encoders and decoders
    dense.json     which dense model they belong to, and which student
    bridges.json   metrics

The dense model's name in dense.json is a path from the folder where it is a folder itself, so that both can be moved
together. Names in it stay as they are; whatever else lies in the folder (logs, checkpoints) is not needed to load it.
"""

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from bridges.maps import Bridges, check_bridges
from distill.artifact import MANIFEST, ArtifactError, Provenance, check_listed, fresh_folder, read_json, write_json
from distill.data.sample import save_sample
from distill.fields import check_fields
from distill.model.load import load_model
from distill.model.run import Runnable
from distill.model.transformer import SparseTransformer

MODEL, BRIDGES, DENSE, METRICS_FILE = "model", "bridges", "dense.json", "bridges.json"


class BridgeMismatchError(ValueError):
    """Bridges and a dense model that do not belong together."""


@dataclass(frozen=True, kw_only=True)
class DenseRecord:
    """Which dense model a student was fitted to."""

    name: str
    """Path or hub name to load it by: in memory as seen from the working folder, in a file from the file's folder."""
    fingerprint: str
    """SHA-256 (hex) of its configuration and weights."""
    n_layer: int
    """Layers."""
    d_model: int
    """Width of its residual stream, in channels."""
    vocab_size: int
    """Tokens in its vocabulary."""

    @classmethod
    def of(cls, dense: Runnable, name: str) -> "DenseRecord":
        """The record of a model that is known as `name`."""
        return cls(
            name=name,
            fingerprint=dense.fingerprint(),
            n_layer=dense.n_layer,
            d_model=dense.d_model,
            vocab_size=dense.vocab_size,
        )

    def stored(self, folder: Path) -> dict[str, Any]:
        """The fields as a file in `folder` holds them: the name of a model folder as the path from there."""
        path = Path(self.name)
        name = os.path.relpath(path.resolve(), folder.resolve()) if path.is_dir() else self.name
        return {**asdict(self), "name": name}

    def found_from(self, folder: Path) -> "DenseRecord":
        """The record that a file in `folder` holds, with the path of the model as seen from anywhere.

        A name that leads to no model folder from there (a short name, one of a hub, a path from the working folder)
        stays as it is.
        """
        path = folder / self.name
        try:
            there = any((place / "config.json").is_file() for place in (path, path / MODEL))
        except OSError:  # too long for a name
            there = False
        if not there:
            return self
        return replace(self, name=str(path.resolve()))

    def check(self, dense: Runnable, name: str = "the model given") -> None:
        """`BridgeMismatchError` naming both unless `dense`, known as `name`, is the model of the record."""
        found = dense.fingerprint()
        if found != self.fingerprint:
            raise BridgeMismatchError(
                f"dense: the bridges were fitted to {self.name!r} with fingerprint {self.fingerprint[:12]}, "
                f"but {name!r} has {found[:12]}; allowed is the model they were fitted to"
            )

    def load(self) -> Runnable:
        """The dense model by its name, checked. `ValueError` where it cannot be found or is another one now."""
        dense = load_model(self.name)
        self.check(dense, self.name)
        return dense


@dataclass(frozen=True, kw_only=True)
class BridgedInfo:
    """What a folder says beside the student and the bridges."""

    dense: DenseRecord
    """The dense model."""
    metrics: Mapping[str, Any]
    """As `bridge_metrics` returned them."""

    @property
    def source(self) -> str:
        """What `load_model` finds the dense model by: a path, a short name or one of a hub."""
        return self.dense.name


def check_place(folder: Path) -> None:
    """`ArtifactError` where `save_bridged` would not replace the student in `folder`: it has no manifest."""
    model = folder / MODEL
    if model.is_dir() and any(model.iterdir()) and not (model / MANIFEST).is_file():
        raise ArtifactError(f"{model}: will not be overwritten, it holds no {MANIFEST}; allowed is another folder")


def save_bridged(
    folder: str | Path,
    student: SparseTransformer,
    bridges: Bridges,
    dense: DenseRecord,
    metrics: Mapping[str, Any],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    compact: bool = False,
    sample: Int[Tensor, "n T1"] | None = None,
    provenance: Provenance | None = None,
) -> None:
    """Write student, bridges, the dense model's record and the metrics into `folder`, over what is there.

    The student appears whole or not at all, and replaces only one that has a manifest.

    Arguments:
        tokenizer: saved beside the student.
        compact: leave the student's zeros out of its file (`SparseTransformer.save_compact`).
        sample: held-out windows to keep beside the student.
        provenance: how the student was made, for its manifest; None where that is not known.

    Raises `ArtifactError` where a folder model/ without a manifest is in the way.
    """
    folder = Path(folder)
    model = folder / MODEL
    if provenance is None:
        described = {"student": dict(student.describe())}
        provenance = Provenance(kind="model", command="bridges.save_bridged", config=described, seed=None, data=None)
    check_place(folder)
    with fresh_folder(model, replace(provenance, kind="model"), replace=True) as place:
        if compact:
            student.save_compact(place)
        else:
            student.save_pretrained(place)
        if tokenizer is not None:
            tokenizer.save_pretrained(place)
        if sample is not None:
            save_sample(place, sample, vocab_size=student.vocab_size)
    bridges.save(folder / BRIDGES)
    # Of what was written, not of what is in memory: a compact file may round.
    written = load_model(model).fingerprint()
    write_json(folder / METRICS_FILE, metrics)
    write_json(folder / DENSE, {**dense.stored(folder), "student": written})


def load_bridged(
    folder: str | Path, dense: Runnable | None = None, *, dense_name: str = "the model given"
) -> tuple[SparseTransformer, Bridges, BridgedInfo]:
    """The student, the bridges and what is known of them, from a folder by `fit_bridges` or `save_bridged`.

    Arguments:
        dense: the dense model to go with them, which is checked; None leaves that to `info.dense.check(...)`, or to
            `info.dense.load()`, which finds it by its name.
        dense_name: what to call `dense` in an error.

    Raises `BridgeMismatchError` for another dense model, `ArtifactError` for a folder that is not whole or whose
    parts do not belong together, `ValueError` for a student that cannot be loaded.
    """
    folder = Path(folder)
    check_listed(folder, DENSE, METRICS_FILE)
    known = read_json(folder / DENSE, what="dense model record")
    metrics = read_json(folder / METRICS_FILE, what="bridge metrics")
    if not isinstance(known, dict) or not isinstance(metrics, dict):
        raise ArtifactError(f"{folder}: {DENSE} and {METRICS_FILE} must each hold a JSON object")
    fingerprint = known.pop("student", None)
    kinds = {"name": str, "fingerprint": str, "n_layer": int, "d_model": int, "vocab_size": int}
    try:
        check_fields(folder / DENSE, known, kinds)
        record = DenseRecord(**known).found_from(folder)
    except (TypeError, ValueError) as error:
        raise ArtifactError(f"{folder / DENSE}: does not say which dense model it is: {error}") from None
    if dense is not None:
        record.check(dense, dense_name)
    student = load_model(folder / MODEL)
    if not isinstance(student, SparseTransformer):
        raise ArtifactError(f"{folder / MODEL}: is a {type(student).__name__}, needed is a sparse student")
    if student.fingerprint() != fingerprint:
        raise ArtifactError(f"{folder / MODEL}: is not the student that {DENSE} speaks of, it was changed or damaged")
    bridges = Bridges.load(folder / BRIDGES)
    check_bridges(bridges, n_layer=record.n_layer, d_dense=record.d_model, d_sparse=student.d_model)
    return student, bridges.eval(), BridgedInfo(dense=record, metrics=metrics)

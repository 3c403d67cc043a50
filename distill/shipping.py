"""A trained model's folder made ready for others: small, and with all that circuits need beside it."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from distill.artifact import Provenance, fresh_folder, read_manifest, write_text
from distill.circuits.ablation import node_means
from distill.circuits.subject import MEANS_FILE, load_subject
from distill.model import DenseModel, SparseTransformer, load_model
from distill.model.card import CARD, model_card
from distill.model.load import model_folder
from distill.training.evaluate import heldout_loss

WEIGHTS = ("model.safetensors", "model.sparse.safetensors")


def ship(path: str | Path, out: Path, *, bigram: str = "float16", name: str | None = None) -> Path:
    """Copies a trained model's folder to `out` with its ablation values beside it, for others to load without a corpus.

    Models of this package are stored compactly. What the manifest says of the model, its `heldout_loss` on the windows
    beside it and its `fingerprint`, is measured on what was stored, and so are the ablation values; those per position,
    of which there are many, are rounded to float16. The card, README.md, is made from the manifest, which does not list
    it.

    Args:
        path: model folder or run folder.
        out: folder to make; an earlier one is replaced.
        bigram: how the bigram table is stored (`SparseTransformer.save_compact`).
        name: what the card calls the model; None: as `out` is called.

    ValueError for a model without held-out windows beside it, ArtifactError for a folder that does not say how it was
    made and for values per position beyond float16.
    """
    folder = model_folder(path)
    if folder is None:
        raise ValueError(f"model: {path} is no folder; only trained models in a folder can be shipped")
    made = read_manifest(folder)
    subject = load_subject(folder)
    model = as_stored(subject.model, bigram)
    measured = {"heldout_loss": heldout_loss(model, subject.sample), "fingerprint": model.fingerprint()}
    with fresh_folder(out, shipped_provenance(made, "model", measured), replace=True) as place:
        for file in made["files"]:
            if file != CARD and not (isinstance(model, SparseTransformer) and file.endswith(WEIGHTS)):
                (place / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(folder / file, place / file)
        if isinstance(model, SparseTransformer):
            model.save_compact(place, bigram=bigram)
        means = node_means(model, subject.sample[:, :-1])
        means.save(place / MEANS_FILE, half=means.per_position)
    write_text(out / CARD, model_card(out, name=name))
    return out


def as_stored(model: SparseTransformer | DenseModel, bigram: str) -> SparseTransformer | DenseModel:
    """The model that comes back once it is stored compactly: with a rounded table. A dense one is stored as it is."""
    if isinstance(model, DenseModel):
        return model
    with TemporaryDirectory() as place:
        model.save_compact(place, bigram=bigram)
        return load_model(place)


def shipped_provenance(made: Mapping[str, Any], kind: str, measured: Mapping[str, Any]) -> Provenance:
    """How something was made, out of its manifest, for the manifest of its copy, with what was measured on the copy."""
    known = made["provenance"]
    return Provenance(
        kind=kind,
        command=known["command"],
        config=known["config"],
        seed=known["seed"],
        data=known["data"],
        extra={**known["extra"], **measured, "made": made["created"], "made_with": made["versions"]},
    )

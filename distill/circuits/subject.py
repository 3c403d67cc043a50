"""A model that circuits are taken from, with all that this needs: tokenizer, ablation values, held-out text."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from distill.artifact import Provenance, default_out, fingerprint, fresh_folder, read_manifest
from distill.circuits.ablation import Means, node_means, windows_fingerprint
from distill.command import pick_device
from distill.data.prepare import prepare
from distill.data.sample import load_sample, spread_windows
from distill.data.tokens import tokenizer_fingerprint
from distill.model import DenseModel, SparseTransformer, check_tokenizer, load_model, load_tokenizer
from distill.model.load import model_folder

MEANS_FILE = "means.safetensors"
WEIGHTS = ("model.safetensors", "model.sparse.safetensors")
TOKENS = default_out("tokens")
"""Where corpora that a model does not bring are packed."""
WINDOWS = 256
"""Held-out windows taken from a corpus."""
LONGEST = 256
"""Tokens in such a window, at most."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """One model, ready to be pruned and judged."""

    name: str
    """What tables and files call it."""
    model: SparseTransformer | DenseModel
    """In evaluation mode."""
    tokenizer: PreTrainedTokenizerFast
    """Its tokenizer."""
    sample: Int[Tensor, "n T1"]
    """Held-out windows, each with one more token than it has targets."""
    means: Means
    """Ablation values: means over the sample."""


def load_subject(
    path_or_name: str | Path,
    *,
    name: str | None = None,
    corpus: Sequence[str] = (),
    sample: Int[Tensor, "n T1"] | None = None,
    device: str = "cpu",
) -> Subject:
    """A model by its folder, short name or hub name, with what lies beside it.

    Args:
        path_or_name: see `distill.model.load_model`.
        name: what to call it; by default the last part of the path.
        corpus: text to hold out windows of (see `read_corpus`), for a model that has none beside it; text that a model
            was trained on is no held-out text, so what lies beside a model always comes first.
        sample: held-out windows for a model that has none beside it, instead of a corpus.
        device: where the model goes.

    The means come from the file beside the model where they were measured on the same model and windows, and are
    measured otherwise. ValueError where there is no such model, its tokenizer does not fit, or there is no text.
    """
    model = load_model(path_or_name)
    tokenizer = load_tokenizer(path_or_name)
    check_tokenizer(tokenizer, model)
    folder = model_folder(path_or_name)
    label = name or Path(path_or_name).resolve().name
    beside = None if folder is None else load_sample(folder)
    if beside is not None:
        sample = beside
    elif corpus:
        # A folder for each tokenizer and corpus, so that one model's tokens are never in the way of another's.
        key = fingerprint({"tokenizer": tokenizer_fingerprint(tokenizer), "corpus": list(corpus)})[:12]
        data = prepare(corpus, TOKENS / key, tokenizer=tokenizer)
        sample = spread_windows(data.heldout, min(model.context, LONGEST), WINDOWS)
    if sample is None:
        raise ValueError(
            f"corpus: {path_or_name} has no held-out text beside it (heldout.safetensors), which its ablation values "
            "are measured on; give a corpus, such as stdlib or a folder of text"
        )
    torch.nn.Module.to(model, pick_device(device)).eval()
    saved = None if folder is None else folder / MEANS_FILE
    means = Means.load(saved) if saved is not None and saved.is_file() else None
    if means is None or means.model != model.fingerprint() or means.data != windows_fingerprint(sample[:, :-1]):
        means = node_means(model, sample[:, :-1])
    return Subject(name=label, model=model, tokenizer=tokenizer, sample=sample, means=means)


def shipped_provenance(made: Mapping[str, Any], kind: str) -> Provenance:
    """How something was made, out of its manifest, for the manifest of its copy."""
    known = made["provenance"]
    return Provenance(
        kind=kind,
        command=known["command"],
        config=known["config"],
        seed=known["seed"],
        data=known["data"],
        extra={**known["extra"], "made": made["created"], "made_with": made["versions"]},
    )


def ship(path: str | Path, out: Path) -> Path:
    """Copies a trained model's folder to `out` with its ablation values beside it, for others to load without a corpus.

    Models of this package are stored compactly (`SparseTransformer.save_compact`).

    Args:
        path: model folder or run folder.
        out: folder to make; an earlier one is replaced.

    ValueError for a model without held-out windows beside it, ArtifactError for a folder that does not say how it was
    made.
    """
    folder = model_folder(path)
    if folder is None:
        raise ValueError(f"model: {path} is no folder; only trained models in a folder can be shipped")
    made = read_manifest(folder)
    provenance = shipped_provenance(made, "model")
    subject = load_subject(folder)
    with fresh_folder(out, provenance, replace=True) as place:
        compact = isinstance(subject.model, SparseTransformer)
        for name in made["files"]:
            if not (compact and name.endswith(WEIGHTS)):
                (place / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(folder / name, place / name)
        if isinstance(subject.model, SparseTransformer):
            subject.model.save_compact(place)
        # Of what was written: compact storage rounds the bigram table.
        node_means(load_model(place), subject.sample[:, :-1]).save(place / MEANS_FILE)
    return out

"""Held-out windows beside a model: a small file, so that figures do not depend on anybody's own copy of the corpus."""

from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from distill.artifact import ArtifactError
from distill.data.tokens import load_ids, save_ids, windows

SAMPLE_FILE = "heldout.safetensors"


def spread_windows(ids: np.ndarray, context: int, limit: int) -> Int[Tensor, "n T1"]:
    """At most `limit` windows of `context` targets, evenly spread over the ids. ValueError for too few ids."""
    every = windows(ids, context)
    return every[torch.linspace(0, len(every) - 1, min(limit, len(every))).long()]


def save_sample(folder: Path, sample: Int[Tensor, "n T1"], *, vocab_size: int) -> None:
    """Writes windows into a model's folder."""
    record = {"windows": len(sample), "length": sample.shape[1]}
    save_ids(folder / SAMPLE_FILE, sample.flatten().numpy(), vocab_size=vocab_size, record=record)


def load_sample(folder: Path) -> Int[Tensor, "n T1"] | None:
    """The windows in a model's folder; None where it has none. ArtifactError for a damaged file."""
    path = folder / SAMPLE_FILE
    if not path.is_file():
        return None
    ids, metadata = load_ids(path)
    record = metadata.get("record")
    length = record.get("length") if isinstance(record, dict) else None
    if type(length) is not int or length < 2 or len(ids) % length or not len(ids):
        raise ArtifactError(f"{path}: {len(ids)} ids are no whole number of windows of {length} tokens")
    return torch.from_numpy(np.asarray(ids, np.int64).reshape(-1, length))

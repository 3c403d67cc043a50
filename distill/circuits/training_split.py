"""Which files the training of a model held out, by what the manifest in its folder says of its corpus."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from distill.artifact import MANIFEST, read_head
from distill.circuits.circuit import Circuit
from distill.circuits.subject import Subject
from distill.data.sample import load_sample
from distill.model.load import model_folder, shipped_names

OPTIONS = ("model", "dense", "bridge")
"""Options of recipes that name a model, in the manifest beside a circuit."""


@dataclass(frozen=True, kw_only=True)
class TrainingSplit:
    """What decides on which side of a training a file was (see `read_corpus`)."""

    seed: int
    heldout_fraction: float
    sources: tuple[str, ...]
    """What the training read."""

    def record(self) -> dict[str, Any]:
        """As it stands in the manifest of a trained model."""
        sources = [{"source": source} for source in self.sources]
        return {"sources": sources, "heldout_fraction": self.heldout_fraction, "seed": self.seed}


def training_split(subject: Subject, places: Sequence[str | Path]) -> TrainingSplit | None:
    """The split that a model was trained with; None where no place says how its text was split by file.

    Arguments:
        places: where the model may lie: folders or short names. It is the first that holds the windows of text that the
            subject has, as what was trained on one split has the same ones.
    """
    for place in places:
        folder = _with_windows(place, subject)
        if folder is None:
            continue
        corpus = read_head(folder)["provenance"].get("extra", {}).get("corpus")
        known = corpus if isinstance(corpus, dict) else {}
        seed, fraction, sources = (known.get(name) for name in ("seed", "heldout_fraction", "sources"))
        if type(seed) is int and isinstance(fraction, float) and 0 < fraction < 1 and isinstance(sources, list):
            names = tuple(str(one["source"]) for one in sources if isinstance(one, dict) and "source" in one)
            return TrainingSplit(seed=seed, heldout_fraction=fraction, sources=names)
    return None


def _with_windows(place: str | Path, subject: Subject) -> Path | None:
    """The folder at a place where it holds the subject's windows, and a manifest."""
    try:
        folder = model_folder(place)
        sample = None if folder is None else load_sample(folder)
    except ValueError:
        return None  # another thing lies there by now: the next place may be right
    same = sample is not None and torch.equal(sample, subject.sample)
    return folder if same and folder is not None and (folder / MANIFEST).is_file() else None


def model_places(circuit: Circuit, file: Path, models: Sequence[str] = ()) -> list[str]:
    """Where the model of a circuit may lie, as `find_subject` looks for it: `models`, or what the manifest beside its
    file and the circuit itself name, and what is shipped."""
    if models:
        return list(models)
    named: list[str] = []
    if (file.parent / MANIFEST).is_file():
        config = read_head(file.parent)["provenance"].get("config", {})
        named = [str(config[option]) for option in OPTIONS if isinstance(config.get(option), str)]
    return list(dict.fromkeys([*named, *([circuit.model_name] if circuit.model_name else []), *shipped_names()]))

"""Which split a model was trained with: the folder that holds its windows of text says."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from distill.artifact import Provenance, write_manifest
from distill.circuits.ablation import Means
from distill.circuits.subject import Subject
from distill.circuits.training_split import TrainingSplit, training_split
from distill.model import SparseTransformer

CORPUS = {"seed": 7, "heldout_fraction": 0.1, "sources": [{"source": "stdlib"}, {"source": "idioms:1"}]}


@pytest.fixture
def subject(
    planted: SparseTransformer,
    planted_means: Means,
    make_windows: Callable[..., Tensor],
    word_tokenizer: PreTrainedTokenizerFast,
) -> Subject:
    return Subject(name="planted", model=planted, tokenizer=word_tokenizer, sample=make_windows(), means=planted_means)


@pytest.fixture
def place(
    planted: SparseTransformer, make_folder: Callable[..., Path], tmp_path: Path
) -> Callable[[str, dict[str, Any]], Path]:
    """A model's folder by its name and what its manifest has extra."""

    def made(name: str, extra: dict[str, Any]) -> Path:
        folder = make_folder(tmp_path / name, planted)
        write_manifest(folder, Provenance(kind="model", command="", config={}, seed=None, data=None, extra=extra))
        return folder

    return made


def test_the_first_place_with_the_subjects_windows_says(subject: Subject, place: Callable[..., Path]) -> None:
    silent, told = place("silent", {}), place("told", {"corpus": CORPUS})
    found = training_split(subject, ["nowhere", str(silent), told])
    assert found == TrainingSplit(seed=7, heldout_fraction=0.1, sources=("stdlib", "idioms:1"))
    # What an edited model keeps of it can be read again.
    again = place("again", {"corpus": found.record()})
    assert training_split(subject, [again]) == found


@pytest.mark.parametrize(
    "corpus",
    [None, [], {}, {**CORPUS, "seed": "0"}, {**CORPUS, "heldout_fraction": 0.0}, {**CORPUS, "sources": "stdlib"}],
)
def test_what_says_nothing_is_no_split(subject: Subject, place: Callable[..., Path], corpus: object) -> None:
    assert training_split(subject, [place("one", {"corpus": corpus})]) is None


def test_other_windows_are_of_another_training(
    subject: Subject, place: Callable[..., Path], make_folder: Callable[..., Path], tmp_path: Path
) -> None:
    told = place("told", {"corpus": CORPUS})
    other = Subject(**{**vars(subject), "sample": torch.zeros_like(subject.sample)})
    assert training_split(other, [told]) is None
    bare = make_folder(tmp_path / "bare", subject.model)
    assert training_split(subject, [bare]) is None
    (told / "heldout.safetensors").write_bytes(b"damaged")
    assert training_split(subject, [told]) is None

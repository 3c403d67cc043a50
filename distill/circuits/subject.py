"""A model that circuits are taken from, with all that this needs: tokenizer, ablation values, held-out text."""

from dataclasses import dataclass
from pathlib import Path

from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from distill.circuits.ablation import Means, node_means
from distill.data.sample import load_sample
from distill.model import DenseModel, SparseTransformer, check_tokenizer, load_model, load_tokenizer
from distill.model.load import model_folder

MEANS_FILE = "means.safetensors"


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
    path_or_name: str | Path, *, name: str | None = None, sample: Int[Tensor, "n T1"] | None = None
) -> Subject:
    """A model by its folder, short name or hub name, with what lies beside it.

    Args:
        path_or_name: see `distill.model.load_model`.
        name: what to call it; by default the last part of the path.
        sample: held-out windows; by default those beside the model.

    The means come from the file beside the model where they were measured on the same model and sample, and are
    measured otherwise. ValueError where there is no such model, its tokenizer does not fit, or there is no sample.
    """
    model = load_model(path_or_name)
    tokenizer = load_tokenizer(path_or_name)
    check_tokenizer(tokenizer, model)
    folder = model_folder(path_or_name)
    if sample is None and folder is not None:
        sample = load_sample(folder)
    if sample is None:
        raise ValueError(
            f"model: {path_or_name} has no held-out text beside it (heldout.safetensors), which the ablation values "
            "are measured on; give a corpus"
        )
    saved = None if folder is None else folder / MEANS_FILE
    if saved is not None and saved.is_file():
        means = Means.load(saved)
        means = means if means.model == model.fingerprint() else node_means(model, sample[:, :-1])
    else:
        means = node_means(model, sample[:, :-1])
    return Subject(
        name=name or Path(path_or_name).name, model=model.eval(), tokenizer=tokenizer, sample=sample, means=means
    )

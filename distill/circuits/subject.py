"""A model that circuits are taken from, with all that this needs: tokenizer, ablation values, held-out text."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from distill.artifact import default_out, fingerprint
from distill.circuits.ablation import Means, node_means, windows_fingerprint
from distill.command import pick_device
from distill.data.prepare import prepare
from distill.data.sample import load_sample, spread_windows
from distill.data.tokens import tokenizer_fingerprint
from distill.model import DenseModel, SparseTransformer, check_tokenizer, load_model, load_tokenizer
from distill.model.load import model_folder

MEANS_FILE = "means.safetensors"
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

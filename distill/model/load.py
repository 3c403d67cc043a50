"""Models and tokenizers by path or by name."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import logging

from distill.artifact import ArtifactError
from distill.model.dense import DenseModel
from distill.model.inspection import DAMAGE, check_folder, first_line, open_tokenizer, read_config
from distill.model.transformer import COMPACT_FILE, SparseTransformer, SparseTransformerConfig

SHIPPED = Path(__file__).parent.parent / "pretrained"


def shipped_names() -> list[str]:
    """Short names of the models in the package."""
    return sorted({path.relative_to(SHIPPED).parts[0] for path in SHIPPED.rglob("config.json")})


def model_folder(path_or_name: str | Path) -> Path | None:
    """The folder that holds the model, or None where the name can only be one of a hub.

    A run folder stands for the `model` folder in it, a short name for a shipped model. ValueError for a folder that
    holds no model.
    """
    path = Path(path_or_name)
    if os.path.isdir(path):  # False, where `Path.is_dir` raises, for what is too long for a name
        for folder in (path, path / "model"):
            if (folder / "config.json").is_file():
                return folder
        raise ValueError(f"model: {path} holds no config.json, nor does a folder model/ in it; it is no model folder")
    if str(path_or_name) in shipped_names():
        return model_folder(SHIPPED / str(path_or_name))
    if os.path.exists(path):
        raise ValueError(f"model: {path} is a file; allowed are a model folder, a hub name, or {shipped_names()}")
    return None


def load_model(path_or_name: str | Path) -> SparseTransformer | DenseModel:
    """The model in a folder, by the short name of a shipped one, or by its hub name, ready for evaluation.

    ValueError where there is no such model, the folder is no model, its weights are damaged, not all there or of
    another shape than its configuration, or its architecture cannot be run.
    """
    folder = model_folder(path_or_name)
    source = str(path_or_name) if folder is None else str(folder)
    sparse = folder is not None and read_config(folder)["model_type"] == SparseTransformerConfig.model_type
    if folder is not None:
        try:
            check_folder(folder)
        except ArtifactError as error:
            raise ArtifactError(f"model: {source} cannot be loaded; {error}") from error
    try:
        if sparse and (Path(source) / COMPACT_FILE).is_file():
            return SparseTransformer.from_pretrained(source).eval()
        with _without_report():
            # What does not fit is told apart below, in one line; by itself it would be drawn at random.
            told: dict[str, Any] = {"output_loading_info": True, "ignore_mismatched_sizes": True}
            told |= {"use_safetensors": True, "trust_remote_code": False}  # no pickle, no code
            if sparse:
                loaded: Any = SparseTransformer.from_pretrained(source, **told)
            else:
                loaded = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **told)
    except OSError as error:
        raise ValueError(
            f"model: {source} cannot be loaded; allowed are a model folder, a hub name that can be reached, or one of "
            f"{shipped_names()} ({first_line(error)})"
        ) from error
    except (SafetensorError, *DAMAGE) as error:
        raise ValueError(f"model: {source} is damaged or no model that is known ({first_line(error)})") from error
    model, info = loaded
    found = model.eval() if sparse else DenseModel(model.eval())
    _check_whole(source, info, strict=sparse)
    return found


def load_tokenizer(path_or_name: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer beside a model. ValueError where there is none, it is damaged, or it has none of the fast kind."""
    folder = model_folder(path_or_name)
    source = str(path_or_name) if folder is None else folder
    if folder is not None and not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise ValueError(f"tokenizer: {folder} holds no tokenizer.json")
    if folder is not None:
        tokenizer = open_tokenizer(folder, AutoTokenizer)
    else:
        try:
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        except DAMAGE as error:
            raise ValueError(f"tokenizer: {source} cannot be loaded ({first_line(error)})") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(f"tokenizer: {source} has a {type(tokenizer).__name__}; allowed are fast tokenizers")
    return tokenizer


@contextmanager
def _without_report() -> Iterator[None]:
    """Transformers' table of tensors that do not fit, held back: it is many lines, and `_check_whole` says the same."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _check_whole(source: str, info: Mapping[str, Any], *, strict: bool) -> None:
    """ValueError where tensors are missing or of another shape; when strict, also where there are others."""
    missing, others = sorted(info["missing_keys"]), sorted(info["unexpected_keys"]) if strict else []
    shapes = sorted((name, tuple(stored), tuple(wanted)) for name, stored, wanted in info["mismatched_keys"])
    if missing:
        raise ValueError(f"model: {source} lacks {len(missing)} tensors of its architecture, such as {missing[0]!r}")
    if shapes:
        name, stored, wanted = shapes[0]
        raise ValueError(f"model: {source}: {name!r} has shape {stored}, its config.json says {wanted}")
    if others:
        raise ValueError(f"model: {source} holds {others[0]!r}, which its config.json has no place for")


def check_tokenizer(tokenizer: PreTrainedTokenizerFast, model: SparseTransformer | DenseModel) -> None:
    """ValueError where the tokenizer can make ids that the model has no embedding for, or far fewer than it has."""
    size = len(tokenizer)
    if size > model.vocab_size:
        raise ValueError(
            f"tokenizer: {size} tokens, but the model's vocabulary has {model.vocab_size}; is it the model's own?"
        )

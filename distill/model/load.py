"""Models and tokenizers by path or by name."""

import json
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from distill.model.dense import DenseModel
from distill.model.transformer import SparseTransformer, SparseTransformerConfig

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
    if path.is_dir():
        for folder in (path, path / "model"):
            if (folder / "config.json").is_file():
                return folder
        raise ValueError(f"model: {path} holds no config.json, nor does a folder model/ in it; it is no model folder")
    if str(path_or_name) in shipped_names():
        return model_folder(SHIPPED / str(path_or_name))
    if path.exists():
        raise ValueError(f"model: {path} is a file; allowed are a model folder, a hub name, or {shipped_names()}")
    return None


def load_model(path_or_name: str | Path) -> SparseTransformer | DenseModel:
    """The model in a folder, by the short name of a shipped one, or by its hub name, ready for evaluation.

    ValueError where there is no such model, the folder is no model, or its architecture cannot be run.
    """
    folder = model_folder(path_or_name)
    source = str(path_or_name) if folder is None else folder
    try:
        if folder is not None and _model_type(folder) == SparseTransformerConfig.model_type:
            return SparseTransformer.from_pretrained(folder).eval()
        return DenseModel.from_pretrained(source)
    except OSError as error:
        raise ValueError(
            f"model: {source} cannot be loaded; allowed are a model folder, a hub name that can be reached, or one of "
            f"{shipped_names()} ({_first_line(error)})"
        ) from error


def load_tokenizer(path_or_name: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer beside a model. ValueError where there is none, or it has none of the fast kind."""
    folder = model_folder(path_or_name)
    source = str(path_or_name) if folder is None else folder
    if folder is not None and not (folder / "tokenizer.json").is_file() and not (folder / "vocab.json").is_file():
        raise ValueError(f"tokenizer: {folder} holds no tokenizer.json")
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except OSError as error:
        raise ValueError(f"tokenizer: {source} cannot be loaded ({_first_line(error)})") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(f"tokenizer: {source} has a {type(tokenizer).__name__}; allowed are fast tokenizers")
    return tokenizer


def check_tokenizer(tokenizer: PreTrainedTokenizerFast, model: SparseTransformer | DenseModel) -> None:
    """ValueError where the tokenizer can make ids that the model has no embedding for, or far fewer than it has."""
    size = len(tokenizer)
    if size > model.vocab_size:
        raise ValueError(
            f"tokenizer: {size} tokens, but the model's vocabulary has {model.vocab_size}; is it the model's own?"
        )


def _model_type(folder: Path) -> str:
    try:
        config = json.loads((folder / "config.json").read_text())
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"model: {folder / 'config.json'} is no JSON ({_first_line(error)})") from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ValueError(f"model: {folder / 'config.json'} names no model_type; it is no model folder")
    return config["model_type"]


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__

"""What is looked at in somebody's model folder before transformers opens it.

Transformers trusts a folder: it runs code that a configuration names (if asked to), unpickles, follows names out of the
folder, and takes the memory that the configuration speaks of. So: with a manifest the files have to be the ones that
were written; weights are safetensors, in the folder; nothing in it names other files or code; the configuration is of
a family that can be run, before anything is built from it, and may not speak of more than is stored.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from distill.artifact import MANIFEST, ArtifactError, read_json, read_manifest
from distill.model.architecture import SparseTransformerConfig
from distill.model.families import check_family

CONFIG, TOKENIZER = "config.json", "tokenizer_config.json"
INDEX = "model.safetensors.index.json"
MAX_CONFIG_BYTES = 2**20
DAMAGE = (
    *(OSError, ValueError, TypeError, LookupError, AttributeError, ImportError, RuntimeError, ArithmeticError),
    StrictDataclassError,
)
"""What transformers raises for values in a folder's files that it does not expect."""
_MORE, _FEW = 4, 10_000_000
"""A configuration may speak of so many times the parameters that are stored, or of so many: mistakes are told apart by
what does not fit, but what would take all memory is not tried."""
_LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_MOST = 10_000
"""Layers, or labels of classes, that a configuration may speak of: transformers writes out lists of them."""
_NAMING_FILES = ("_file", "_path")


def check_folder(folder: Path) -> None:
    """ValueError, as ArtifactError where the folder has a manifest, that names what cannot be loaded, or must not."""
    if (folder / MANIFEST).is_file():
        read_manifest(folder, "model")
    config = check_config(folder)
    path = folder / CONFIG
    if "quantization_config" in config:
        raise ArtifactError(f"{path}: quantization_config; allowed are weights in floating point")
    if (folder / "adapter_config.json").is_file():
        raise ArtifactError(f"{folder}: holds an adapter (adapter_config.json); allowed are whole models")
    tensors, parameters = _stored(folder)
    for name in _LAYERS:
        layers = config.get(name)
        if isinstance(layers, int) and tensors is not None and layers > tensors:
            raise ArtifactError(f"{path}: {name} is {layers}, but the weights beside it are {tensors} tensors")
    if parameters is not None:
        _check_size(path, folder, parameters)


def check_config(folder: Path) -> dict[str, Any]:
    """What `config.json` holds, where transformers may make a configuration of it.

    ValueError for a family that cannot be run, for one that names code, and for one that takes memory by itself.
    """
    config, path = read_config(folder), folder / CONFIG
    if "auto_map" in config:
        raise ArtifactError(f"{path}: auto_map names code to be run; allowed are architectures of transformers")
    if config["model_type"] != SparseTransformerConfig.model_type:
        try:
            check_family(config["model_type"])
        except ValueError as error:
            raise ArtifactError(f"{path}: {error}") from None
    for name in (*_LAYERS, "num_labels"):
        number = config.get(name)
        if isinstance(number, int | float) and not number <= _MOST:
            raise ArtifactError(f"{path}: {name} is {number}, allowed are up to {_MOST}")
    repeated = config.get("attention_types")
    for item in repeated if isinstance(repeated, list) else ():  # GPT-Neo's kinds, and how often each is repeated
        repeats = item[1] if isinstance(item, list) and len(item) == 2 else None
        if type(repeats) is not int or not 0 <= repeats <= _MOST:
            raise ArtifactError(f"{path}: attention_types holds {item!r}; allowed are [kinds, repeats], one a layer")
    return config


def read_config(folder: Path) -> dict[str, Any]:
    """What `config.json` holds: an object with a `model_type`. ValueError otherwise."""
    path = folder / CONFIG
    try:
        config = read_json(path, what="configuration", max_bytes=MAX_CONFIG_BYTES)
    except ArtifactError as error:
        raise ValueError(f"model: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ValueError(f"model: {path} names no model_type; it is no model folder")
    return config


def open_tokenizer(folder: Path, kind: Any = PreTrainedTokenizerFast) -> Any:
    """The tokenizer in a folder, by `kind.from_pretrained`. ValueError, in a line, for whatever is wrong there."""
    if (folder / CONFIG).is_file():  # AutoTokenizer may look there
        check_config(folder)
    if (folder / "tokenizer.json").is_file():
        _check_tokenizer_file(folder / "tokenizer.json")
    _check_settings(folder / TOKENIZER)
    try:
        return kind.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        # The tokenizers library raises the bare class for whatever is wrong; its subclasses are other people's bugs.
        if type(error) is not Exception and not isinstance(error, DAMAGE):
            raise
        raise ValueError(f"tokenizer: {folder} cannot be loaded ({first_line(error)})") from error


def _check_tokenizer_file(path: Path) -> None:
    try:
        _check_prefix(path)
        Tokenizer.from_file(str(path))
    except Exception as error:
        if type(error) is not Exception and not isinstance(error, ArtifactError):
            raise
        raise ValueError(f"tokenizer: {path} is damaged or no tokenizer ({first_line(error)})") from error


def _check_prefix(path: Path) -> None:
    """ArtifactError where a merge lacks the prefix of what goes on with a word: the tokenizers library cuts it off
    unseen, and panics."""
    found = read_json(path, what="tokenizer")
    model: Any = found.get("model") if isinstance(found, dict) else None
    prefix = model.get("continuing_subword_prefix") if isinstance(model, dict) else None
    if not isinstance(prefix, str) or not prefix or not isinstance(model.get("merges"), list):
        return
    for merge in model["merges"]:
        last = (
            merge.split(" ")[-1] if isinstance(merge, str) else merge[-1] if isinstance(merge, list) and merge else ""
        )
        if not isinstance(last, str) or not last.startswith(prefix):
            raise ArtifactError(f"{path}: continuing_subword_prefix is {prefix!r}, but the merge {merge!r} lacks it")


def _check_settings(path: Path) -> None:
    """ValueError where the tokenizer's settings are no object, or name files or code."""
    if not path.is_file():
        return
    settings = read_json(path, what="tokenizer settings")
    if not isinstance(settings, dict):
        raise ArtifactError(f"{path}: is a {type(settings).__name__}, allowed is an object")
    for name, value in settings.items():
        if value is not None and (name == "auto_map" or name.endswith(_NAMING_FILES) and name != "name_or_path"):
            raise ArtifactError(f"{path}: {name} names other files or code; allowed are those of the folder")


def _stored(folder: Path) -> tuple[int | None, int | None]:
    """How many tensors and entries the weights in a folder have, by their heads; None where they are stored compactly.

    Raises ArtifactError for weights that are not there, lie elsewhere, or are damaged.
    """
    names = list(_weight_files(folder))
    if not names:
        return None, None
    tensors = entries = 0
    for name in names:
        try:
            with safe_open(folder / name, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 (no mapping)
                    tensors += 1
                    entries += math.prod(file.get_slice(key).get_shape())
        except (SafetensorError, OSError) as error:
            raise ArtifactError(f"{folder / name}: is no readable weights file: {error}") from None
    return tensors, entries


def _weight_files(folder: Path) -> Iterator[str]:
    if (folder / "model.safetensors").is_file():
        yield "model.safetensors"
    elif (folder / INDEX).is_file():
        index = read_json(folder / INDEX, what="index of weights")
        places = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
            raise ArtifactError(f"{folder / INDEX}: 'weight_map' must be an object, of tensors to files")
        for name in sorted(set(places.values())):
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise ArtifactError(f"{folder / INDEX}: {name!r}; allowed are names of safetensors in the folder")
            yield name


def _check_size(path: Path, folder: Path, stored: int) -> None:
    """Builds the model without memory, and refuses one that is far larger than what is stored."""
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except DAMAGE as error:
        raise ArtifactError(f"{path}: describes no model that is known ({first_line(error)})") from error
    asked = sum(parameter.numel() for parameter in model.parameters()) + sum(b.numel() for b in model.buffers())
    if asked > max(_MORE * stored, _FEW):
        raise ArtifactError(f"{path}: describes {asked} parameters, but the weights beside it are {stored}")


def first_line(error: BaseException) -> str:
    """What an error says, without what it says further down."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__

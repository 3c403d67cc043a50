"""OpenAI's released checkpoints (repository openai/circuit_sparsity): their options and tensors, and ours.

A folder holds `beeg_config.json` and `final_model.pt`. What each of their options means stands in
`distill/formats/README.md`; every one that changes what a model computes has a field in `Architecture`, so that a
checkpoint becomes an ordinary `SparseTransformer`, and back without a bit changed:

    model = SparseTransformer.from_openai("models/csp_yolo1")

`read_checkpoint` checks names, types and shapes of everything against the configuration before a tensor is used.
"""

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.artifact import ArtifactError, read_json, write_json
from distill.model.architecture import RESIDUAL_TOPK, Architecture
from distill.model.torch_file import FLOATS, check_stored, load_torch, save_torch

CONFIG_FILE = "beeg_config.json"
WEIGHTS_FILE = "final_model.pt"
MAX_CONFIG_BYTES = 2**20

RMS_EPS = float(torch.finfo(torch.float32).eps)
"""What `nn.RMSNorm` adds by default; their LayerNorm adds `LAYER_EPS`."""
LAYER_EPS = 1e-5

DEFAULTS: dict[str, Any] = {
    "block_size": 1024,
    "vocab_size": 50304,
    "n_layer": 12,
    "n_head": 12,
    "d_head": None,
    "d_model": 768,
    "dropout": 0.0,
    "bias": True,
    "ln_bias": True,
    "rms_norm": False,
    "residual_activation_type": "identity",
    "activation_type": "gelu",
    "afrac": None,
    "afrac_loctypes": "attn_in,attn_out,mlp_in,mlp_out",
    "debug_nans": False,
    "tied_unembed": True,
    "tokenizer_name": "tinypython_2k",
    "grad_checkpointing": True,
    "d_mlp": None,
    "enable_bigram_table": False,
    "learnable_bigram_table": False,
    "d_pos_emb": None,
    "dropout_cat_pos_emb": False,
    "sinusoidal_cat_pos_emb": False,
    "enable_sparse_kernels": False,
    "flash": True,
    "sink": False,
}
"""Their options and what a missing one stands for."""
PLACES = {
    "attn_in": "attn.act_in",
    "attn_q": "attn.q",
    "attn_k": "attn.k",
    "attn_v": "attn.v",
    "attn_out": "attn.resid_delta",
    "mlp_in": "mlp.act_in",
    "mlp_neuron": "mlp.post_act",
    "mlp_out": "mlp.resid_delta",
    **{place: place for place in RESIDUAL_TOPK},
}
"""Where AbsTopK acts: their names and ours."""
IDLE = (
    *("dropout", "debug_nans", "tokenizer_name", "grad_checkpointing", "learnable_bigram_table"),
    *("dropout_cat_pos_emb", "sinusoidal_cat_pos_emb", "enable_sparse_kernels", "flash"),
)
"""Options that do not change what a finished model computes; they are kept to be written back."""
OLD_WIDTH, AUXILIARY, RANK = "n_mlp", "use_tied_aux_matrix", "bigram_table_rank"
"""Keys of older files: another name of d_mlp; a matrix that must not be there; and one that their loader drops unread,
but asks for."""
_COUNTS = ("block_size", "vocab_size", "n_layer", "n_head", "d_model")
_WIDTHS = ("d_head", "d_mlp", "d_pos_emb")
_CHOICES = {"residual_activation_type": ("identity", "relu"), "activation_type": ("gelu", "relu")}


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """One of OpenAI's checkpoints, read and checked."""

    architecture: Architecture
    """What it is in this package's terms."""
    tensors: dict[str, Tensor]
    """Its weights under the names of `SparseTransformer`, float32."""
    config: dict[str, Any]
    """Its configuration, complete, in their terms."""


def read_checkpoint(folder: str | os.PathLike[str]) -> Checkpoint:
    """A folder of theirs. Tensors of other float types than float32 are widened or rounded, as their loader does.

    ArtifactError (a ValueError) names the file and the field or tensor: a file that is missing, cut or damaged; an
    unknown option, a value that is not allowed; a tensor that is missing, unknown, of another shape, or no float.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ArtifactError(f"{folder}: no such folder; allowed is one with {CONFIG_FILE} and {WEIGHTS_FILE}")
    path = folder / CONFIG_FILE
    config = read_config(read_json(path, what="configuration", max_bytes=MAX_CONFIG_BYTES), path)
    weights = folder / WEIGHTS_FILE
    stored = load_torch(weights, what="checkpoint")
    if not isinstance(stored, dict) or not all(isinstance(name, str) for name in stored):
        raise ArtifactError(f"{weights}: holds a {type(stored).__name__}, allowed is a dict of tensors by name")
    if config["n_layer"] > len(stored):
        raise ArtifactError(f"{path}: n_layer is {config['n_layer']}, but {WEIGHTS_FILE} has {len(stored)} tensors")
    bias = "final_logits_bias" in stored
    try:
        architecture = architecture_of(config, logits_bias=bias)
    except ValueError as error:
        raise ArtifactError(f"{path}: {error}") from None
    _check_tensors(weights, stored, config, shapes(architecture))
    return Checkpoint(architecture=architecture, tensors=_ours(stored, architecture), config=config)


# --- configuration ---------------------------------------------------------------------------------------------------


def read_config(found: Any, path: str | Path = CONFIG_FILE) -> dict[str, Any]:
    """All of their options out of what a file says. ArtifactError naming the option, its value and what is allowed."""
    if not isinstance(found, dict):
        raise ArtifactError(f"{path}: holds a {type(found).__name__}, allowed is an object of options")
    found = dict(found)
    found.pop(RANK, None)
    if found.pop(AUXILIARY, False):
        raise ArtifactError(f"{path}: {AUXILIARY} is on; allowed is off, such models were never released")
    if OLD_WIDTH in found:
        if found.get("d_mlp") is not None:
            raise ArtifactError(f"{path}: {OLD_WIDTH} and d_mlp both given; allowed is one, they mean the same")
        found["d_mlp"] = found.pop(OLD_WIDTH)
    for name in found:
        if name not in DEFAULTS:
            raise ArtifactError(f"{path}: unknown option {name!r}; allowed are {', '.join(DEFAULTS)}")
    config = {**DEFAULTS, **found}
    for name, value in config.items():
        allowed = _allowed(name, value)
        if allowed is not None:
            raise ArtifactError(f"{path}: {name} is {value!r}; allowed: {allowed}")
    if config["d_model"] % config["n_head"]:
        raise ArtifactError(f"{path}: d_model is {config['d_model']}; allowed: multiples of n_head, {config['n_head']}")
    return config


def _allowed(name: str, value: Any) -> str | None:
    """None where the value of an option is possible, else what is."""
    whole = type(value) is int and value >= 1
    if name in _COUNTS:
        return None if whole else "whole numbers from 1"
    if name in _WIDTHS:
        return None if value is None or whole else "whole numbers from 1, or null"
    if name in _CHOICES:
        return None if value in _CHOICES[name] else ", ".join(_CHOICES[name])
    if name == "afrac":
        number = type(value) in (int, float) and 0 < value <= 1
        return None if value is None or number else "numbers above 0 up to 1, or null"
    if name == "dropout":
        return None if type(value) in (int, float) and 0 <= value < 1 else "numbers from 0 to below 1"
    if name == "afrac_loctypes":
        known = isinstance(value, str) and all(place in PLACES for place in _places(value))
        return None if known else f"names with commas between them, out of {', '.join(PLACES)}"
    if name == "tokenizer_name":
        return None if isinstance(value, str) else "text"
    return None if type(value) is bool else "true, false"


def _places(text: str) -> list[str]:
    return [place for place in text.split(",") if place]


def architecture_of(config: Mapping[str, Any], *, logits_bias: bool) -> Architecture:
    """What a complete configuration of theirs is here. ValueError for one that this package cannot run."""
    rms, concat = config["rms_norm"], config["d_pos_emb"] is not None
    heads = config["n_head"]
    architecture = Architecture(
        vocab_size=config["vocab_size"],
        context=config["block_size"],
        n_layer=config["n_layer"],
        d_model=config["d_model"],
        d_head=config["d_head"] or config["d_model"] // heads,
        n_head=heads,
        d_mlp=config["d_mlp"] or 4 * config["d_model"],
        norm="rms" if rms else "layer",
        norm_bias=config["ln_bias"] and not rms,
        norm_eps=RMS_EPS if rms else LAYER_EPS,
        linear_bias=config["bias"],
        activation=config["activation_type"],
        topk_fraction=None if config["afrac"] is None else float(config["afrac"]),
        topk_at=tuple(PLACES[place] for place in _places(config["afrac_loctypes"])),
        residual_activation=config["residual_activation_type"],
        position="concat" if concat else "added",
        d_position=config["d_pos_emb"] or 0,
        sink=config["sink"],
        bigram=config["enable_bigram_table"],
        tied_unembedding=config["tied_unembed"],
        logits_bias=logits_bias,
    )
    _check_topk(architecture)
    return architecture


def _check_topk(a: Architecture) -> None:
    """ValueError where int(fraction * width) is 0: they then zero all channels, and this package keeps one."""
    for theirs, kind in PLACES.items():
        width = a.d_model if kind in RESIDUAL_TOPK else a.width(kind)
        if a.topk_fraction is not None and kind in a.topk_at and int(a.topk_fraction * width) < 1:
            raise ValueError(
                f"afrac: {a.topk_fraction} keeps none of the {width} channels at {theirs}; allowed: 1 and more"
            )


def config_of(a: Architecture, like: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The configuration that says the same of a model in their terms.

    Arguments:
        a: the model.
        like: an earlier configuration of theirs, for the options that do not change what a model computes.

    ValueError naming the field of the model that their format has no word for.
    """
    eps = RMS_EPS if a.norm == "rms" else LAYER_EPS
    lacking = {
        "norm_eps": (a.norm_eps, eps, a.norm_eps == eps),
        "activation": (a.activation, "gelu, relu", a.activation in ("gelu", "relu")),
        "n_head": (a.heads, f"divisors of d_model, {a.d_model}", a.d_model % a.heads == 0),
    }
    for field, (value, allowed, holds) in lacking.items():
        if not holds:
            raise ValueError(f"{field}: {value!r} has no place in OpenAI's format; allowed there: {allowed}")
    _check_topk(a)
    back = {ours: theirs for theirs, ours in PLACES.items()}
    config = {**DEFAULTS, **{name: value for name, value in (like or {}).items() if name in IDLE}}
    config |= {
        "block_size": a.context,
        "vocab_size": a.vocab_size,
        "n_layer": a.n_layer,
        "n_head": a.heads,
        "d_head": a.d_head,
        "d_model": a.d_model,
        "d_mlp": a.neurons,
        "bias": a.linear_bias,
        "ln_bias": a.norm_bias,
        "rms_norm": a.norm == "rms",
        "residual_activation_type": a.residual_activation,
        "activation_type": a.activation,
        "afrac": a.topk_fraction,
        "afrac_loctypes": ",".join(back[kind] for kind in a.topk_at),
        "tied_unembed": a.tied_unembedding,
        "enable_bigram_table": a.bigram,
        "d_pos_emb": a.d_position or None,
        "sink": a.sink,
    }
    return config


# --- tensors ---------------------------------------------------------------------------------------------------------


def _names(a: Architecture) -> Iterator[tuple[str, tuple[str, ...], tuple[int, ...]]]:
    """Each tensor of theirs: its name, ours (three where theirs stands for q, k and v), and its shape."""
    concat = a.position == "concat"
    norms = [("ln_1", "attn_norm", a.d_model), ("ln_2", "mlp_norm", a.d_model)]
    if concat:
        norms += [("ln_p1", "attn_position_norm", a.d_position), ("ln_p2", "mlp_position_norm", a.d_position)]
    read, heads = a.width("attn.act_in"), a.heads * a.d_head
    maps = [
        ("attn.c_attn", ("attn_q", "attn_k", "attn_v"), (3 * heads, read)),
        ("attn.c_proj", ("attn_out",), (a.d_model, heads)),
        ("mlp.c_fc", ("mlp_in",), (a.neurons, read)),
        ("mlp.c_proj", ("mlp_out",), (a.d_model, a.neurons)),
    ]
    yield "transformer.wte.weight", ("embed_tokens.weight",), (a.vocab_size, a.d_model)
    yield "transformer.wpe.weight", ("embed_positions.weight",), (a.context, a.d_position or a.d_model)
    for i in range(a.n_layer):
        theirs, ours = f"transformer.h.{i}", f"layers.{i}"
        for name, norm, width in norms:
            for part in ("weight", *(["bias"] if a.norm_bias else [])):
                yield f"{theirs}.{name}.{part}", (f"{ours}.{norm}.{part}",), (width,)
        for name, linears, shape in maps:
            yield f"{theirs}.{name}.weight", tuple(f"{ours}.{linear}.weight" for linear in linears), shape
            if a.linear_bias:
                yield f"{theirs}.{name}.bias", tuple(f"{ours}.{linear}.bias" for linear in linears), shape[:1]
        if a.sink:
            yield f"{theirs}.attn.attn_imp.sink_logit", (f"{ours}.attn_sink",), (a.heads,)
    for part in ("weight", *(["bias"] if a.norm_bias else [])):
        yield f"transformer.ln_f.{part}", (f"final_norm.{part}",), (a.d_model,)
    yield "lm_head.weight", ("unembed.weight",), (a.vocab_size, a.d_model)
    if a.logits_bias:
        yield "final_logits_bias", ("unembed.bias",), (a.vocab_size,)
    if a.bigram:
        yield "bigram_table", ("bigram",), (a.vocab_size, a.vocab_size)


def shapes(a: Architecture) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in a checkpoint of theirs, in the order of their code."""
    return {name: shape for name, _, shape in _names(a)}


def _check_tensors(
    path: Path, stored: dict[str, Any], config: Mapping[str, Any], wanted: Mapping[str, tuple[int, ...]]
) -> None:
    for name, shape in wanted.items():
        if name not in stored:
            raise ArtifactError(f"{path}: lacks {name!r}, which the {CONFIG_FILE} beside it asks for")
        tensor = check_stored(path, name, stored[name])
        if tuple(tensor.shape) != shape:
            raise ArtifactError(f"{path}: {name!r} has shape {tuple(tensor.shape)}, {CONFIG_FILE} says {shape}")
        if tensor.dtype not in FLOATS:
            raise ArtifactError(f"{path}: {name!r} is of {tensor.dtype}, allowed are {', '.join(map(str, FLOATS))}")
    for name in stored.keys() - wanted.keys():
        if not _is_causal_mask(name, stored[name], config):
            raise ArtifactError(f"{path}: holds {name!r}, which the {CONFIG_FILE} beside it has no place for")
    if config["tied_unembed"] and not torch.equal(stored["transformer.wte.weight"], stored["lm_head.weight"]):
        raise ArtifactError(f"{path}: 'lm_head.weight' is not 'transformer.wte.weight', but tied_unembed is on")


def _is_causal_mask(name: str, value: Any, config: Mapping[str, Any]) -> bool:
    """Whether this is the buffer of ones and zeros that their attention without `flash` leaves in a checkpoint."""
    parts = name.split(".")
    if parts[:2] != ["transformer", "h"] or parts[3:] != ["attn", "bias"] or not isinstance(value, Tensor):
        return False
    return tuple(value.shape) == (1, 1, config["block_size"], config["block_size"])


def _ours(stored: Mapping[str, Tensor], a: Architecture) -> dict[str, Tensor]:
    """Their tensors under our names, copied out of the file."""
    found: dict[str, Tensor] = {}
    for theirs, ours, _ in _names(a):
        for name, part in zip(ours, stored[theirs].chunk(len(ours)), strict=True):
            found[name] = part.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    if a.tied_unembedding:
        found["unembed.weight"] = found["embed_tokens.weight"]
    return found


def write_checkpoint(
    folder: str | Path, a: Architecture, tensors: Mapping[str, Tensor], *, like: Mapping[str, Any] | None = None
) -> None:
    """Writes both files into a folder that is there (see `distill.artifact.fresh_folder`).

    Arguments:
        a: the model.
        tensors: its weights under the names of `SparseTransformer` (`state_dict`).
        like: as for `config_of`.

    A model without positions gets a table of zeros, which is the same. ValueError as `config_of`.
    """
    config = config_of(a, like)
    stored: dict[str, Tensor] = {}
    for theirs, ours, shape in _names(a):
        if a.position == "none" and theirs == "transformer.wpe.weight":
            stored[theirs] = torch.zeros(shape)
        elif a.tied_unembedding and theirs == "lm_head.weight":
            stored[theirs] = stored["transformer.wte.weight"]
        else:
            parts = [_own(tensors[name]) for name in ours]
            stored[theirs] = parts[0] if len(parts) == 1 else torch.cat(parts)
    write_json(Path(folder) / CONFIG_FILE, {**config, RANK: None})
    save_torch(Path(folder) / WEIGHTS_FILE, stored)


def _own(tensor: Tensor) -> Tensor:
    """In float32 on the CPU, in a storage that holds nothing else, which would be written as well."""
    tensor = tensor.detach().to("cpu", torch.float32).contiguous()
    own = tensor.untyped_storage().nbytes() == math.prod(tensor.shape) * tensor.element_size()
    return tensor if own else tensor.clone()

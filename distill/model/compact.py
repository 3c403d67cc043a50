"""Compact storage of finished sparse models: non-zero entries with the distance from one to the next.

A tensor with few non-zeros is stored as `{name}.gaps` (uint8 or uint16, whichever gives the smaller file) and
`{name}.values`: entry n lies at the sum of the first n + 1 gaps, counted from position -1. A gap too wide for its
integer is bridged by explicit zeros, so no escape code is needed. Tables that are dense by nature (bigram) may be
rounded: to float16, or to 8 bits with an offset and a scale for each row, `{name}` (uint8), `{name}.offset` and
`{name}.scale` (float32), entry = offset + code * scale. The rest stays as it is. The header says shape, type and
storage of every tensor; all of it is checked against the stored arrays before anything of the declared size is
allocated.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from distill.artifact import ArtifactError, load_tensors, save_tensors

KIND = "compact"
DENSE_ABOVE = 0.4
"""Share of non-zeros above which a tensor is stored as it is."""
MAX_BYTES = 16 * 2**30
"""Largest total size of the tensors that `load_compact` unpacks unless told otherwise."""

MOST_UNPACKED, FREE_BYTES = 2**16, 2**26
"""How many times its size a file may unfold to, as the widest gap allows, and what it may besides (zeros)."""

TablePrecision = Literal["float32", "float16", "int8"]
"""How a table is stored: as it is, or rounded to 2 bytes or to 1 byte an entry."""
ROUNDED: Mapping[str, str] = {"bigram": "float16"}
"""Tables that are rounded unless told otherwise, by the last part of their names."""

_TYPES = {str(t).removeprefix("torch."): t for t in (torch.float64, torch.float32, torch.float16, torch.bfloat16)}
_GAP_TYPES = (np.uint8, np.uint16)
_CODES = 255
"""The largest code of a table in 8 bits."""
_SCALE_BITS, _FINEST, _SMALLEST = 12, 2.0**-18, 2.0**-100
"""Significant bits of a row's scale, and the least it may be, of the row's offset and at all. With them the sums
`offset + code * scale` in float32 are near enough to the exact ones for the same codes to be found again."""
_BLOCK = 256
"""Rows that are worked on at a time."""
_STORAGES = {
    "sparse": ("{name}.gaps", "{name}.values"),
    "half": ("{name}",),
    "affine": ("{name}.offset", "{name}.scale", "{name}"),
    "dense": ("{name}",),
}
"""The arrays that make up a tensor, by how it is stored; the last one has its entries."""


def save_compact(path: str | Path, state_dict: Mapping[str, Tensor], *, rounded: Mapping[str, str] = ROUNDED) -> None:
    """Write the tensors of a model to one compact file, in one step.

    Arguments:
        path: file to write, by convention `model.sparse.safetensors`.
        state_dict: names to tensors; sparse ones come back exactly (a negative zero as zero).
        rounded: last parts of the names of tables, and how they are stored: float16 keeps 3 digits, int8 keeps 256
            steps between the least and the largest entry of a row. What was rounded so before comes back exactly.

    Raises `ArtifactError` for a table with values beyond float16's 65504, and for int8 one that is not of float32 or
    whose values are not finite; `ValueError` for another precision.
    """
    for table, precision in rounded.items():
        if precision not in get_args(TablePrecision):
            raise ValueError(f"{table}: got precision {precision!r}, allowed are {', '.join(get_args(TablePrecision))}")
    stored: dict[str, Tensor] = {}
    declared: dict[str, dict[str, Any]] = {}
    for name, tensor in state_dict.items():
        tensor = tensor.detach().cpu()
        entry = {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
        precision = rounded.get(name.split(".")[-1], "float32") if tensor.is_floating_point() else "float32"
        if precision == "float16":
            entry["storage"] = "half"
            parts = [_as_half(path, name, tensor)]
        elif precision == "int8":
            entry["storage"] = "affine"
            parts = _as_codes(path, name, tensor)
        elif entry["dtype"] in _TYPES and int(torch.count_nonzero(tensor)) < DENSE_ABOVE * tensor.numel():
            entry["storage"] = "sparse"
            parts = _pack(tensor.reshape(-1))
        else:
            entry["storage"] = "dense"
            parts = [tensor]
        stored |= dict(zip(_parts(name, entry), parts, strict=True))
        declared[name] = entry
    save_tensors(path, stored, {"kind": KIND, "tensors": declared})


def load_compact(path: str | Path, *, max_bytes: int = MAX_BYTES) -> dict[str, Tensor]:
    """The tensors of a file by `save_compact`, dense, on the CPU, with the types and names they had.

    Arguments:
        max_bytes: largest total size of the result; a header that declares more is refused before any allocation.

    Raises `ArtifactError` for a file that is missing, damaged, too large, or whose arrays contradict its header.
    """
    path = Path(path)
    stored, head = load_tensors(path, kind=KIND)
    declared = head.get("tensors")
    if not isinstance(declared, dict):
        raise ArtifactError(f"{path}: 'tensors' must be an object of tensor names")
    needed = set()
    total = 0
    for name, entry in declared.items():
        _check_entry(path, name, entry, stored)
        needed |= set(_parts(name, entry))
        total += _declared_bytes(entry, stored.get(name))
        if total > path.stat().st_size * MOST_UNPACKED + FREE_BYTES:
            raise ArtifactError(f"{path}: declares {total} bytes of tensors, more than {MOST_UNPACKED} times its size")
        if total > max_bytes:
            raise ArtifactError(f"{path}: declares more than {max_bytes} bytes of tensors (max_bytes)")
    if needed != set(stored):
        raise ArtifactError(f"{path}: holds the undeclared tensor {min(set(stored) - needed)!r}")
    return {name: _restore(path, name, entry, stored) for name, entry in declared.items()}


def _parts(name: str, entry: Mapping[str, Any]) -> list[str]:
    """Names of the arrays that make up a tensor."""
    return [part.format(name=name) for part in _STORAGES[entry["storage"]]]


def _as_half(path: str | Path, name: str, tensor: Tensor) -> Tensor:
    rounded = tensor.to(torch.float16)
    if bool((rounded.isinf() & ~tensor.isinf()).any()):
        raise ArtifactError(f"{path}: {name} has values beyond 65504, it cannot be stored as float16 (half)")
    return rounded


def _as_codes(path: str | Path, name: str, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Offset and scale of each row of a matrix, and its entries as steps of that scale from that offset."""
    if table.dtype != torch.float32 or table.dim() != 2 or not table.shape[1]:
        raise ArtifactError(
            f"{path}: {name} is {table.dtype} {list(table.shape)}, only matrices of float32 can be stored as int8"
        )
    offset = table.amin(1)
    ranges = table.amax(1).double() - offset.double()
    least = (offset.double().abs() * _FINEST).clamp_min(_SMALLEST)
    scale = _nearest(torch.maximum(ranges / _CODES, least)).float()
    if not bool((offset + _CODES * scale).isfinite().all()):
        raise ArtifactError(f"{path}: {name} has values that are not finite or too large to be stored as int8")
    # Some rows at a time: in float64 a large table would take eight times its memory.
    blocks = zip(*(part.split(_BLOCK) for part in (table, offset[:, None], scale[:, None])), strict=True)
    codes = [
        ((rows.double() - low.double()) / step.double()).round_().clamp_(0, _CODES).to(torch.uint8)
        for rows, low, step in blocks
    ]
    return offset, scale, torch.cat(codes)


def _nearest(values: Tensor) -> Tensor:
    """Rounded to `_SCALE_BITS` significant bits."""
    mantissa, exponent = torch.frexp(values)
    return torch.ldexp((mantissa * 2**_SCALE_BITS).round(), exponent - _SCALE_BITS)


def _pack(flat: Tensor) -> tuple[Tensor, Tensor]:
    """Gaps and values of the non-zero entries, in the integer type that takes fewer bytes."""
    places = torch.nonzero(flat).reshape(-1)
    gaps = np.diff(places.numpy(), prepend=-1)
    sizes = [
        int(np.sum(-(-gaps // np.iinfo(kind).max))) * (np.dtype(kind).itemsize + flat.element_size())
        for kind in _GAP_TYPES
    ]
    kind = _GAP_TYPES[int(np.argmin(sizes))]
    widest = np.iinfo(kind).max
    pieces = -(-gaps // widest)  # how many entries each gap takes; all but the last are explicit zeros
    ends = np.cumsum(pieces) - 1
    narrow = np.full(int(pieces.sum()), widest, dtype=kind)
    narrow[ends] = gaps - (pieces - 1) * widest
    values = torch.zeros(len(narrow), dtype=flat.dtype)
    values[torch.from_numpy(ends)] = flat[places]
    return torch.from_numpy(narrow), values


def _check_entry(path: Path, name: str, entry: Any, stored: Mapping[str, Tensor]) -> None:
    """Refuse a header entry of unknown form, or one that the stored arrays contradict."""
    what = f"{path}: tensor {name!r}"
    if not isinstance(entry, dict) or entry.get("storage") not in list(_STORAGES):
        raise ArtifactError(f"{what}: 'storage' must be {', '.join(_STORAGES)}")
    storage, shape = entry["storage"], entry.get("shape")
    if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
        raise ArtifactError(f"{what}: shape {shape!r}, allowed are lists of sizes from 0")
    if storage != "dense" and entry.get("dtype") not in _TYPES:
        raise ArtifactError(f"{what}: dtype {entry.get('dtype')!r}, allowed are {', '.join(_TYPES)}")
    parts = _parts(name, entry)
    for part in parts:
        if part not in stored:
            raise ArtifactError(f"{what}: the file holds no {part!r}")
    array = stored[parts[-1]]
    if storage in ("sparse", "dense") and str(array.dtype).removeprefix("torch.") != entry.get("dtype"):
        raise ArtifactError(f"{what}: declared as {entry.get('dtype')!r}, stored as {array.dtype}")
    if storage == "sparse":
        gaps = stored[parts[0]]
        if gaps.dtype not in (torch.uint8, torch.uint16) or gaps.dim() != 1 or gaps.shape != array.shape:
            raise ArtifactError(f"{what}: gaps and values must be two lists of equal length, gaps of uint8 or uint16")
    elif list(array.shape) != shape or (storage == "half" and array.dtype != torch.float16):
        raise ArtifactError(f"{what}: declared with shape {shape}, stored as {array.dtype} {list(array.shape)}")
    if storage == "affine":
        _check_codes(what, entry, *(stored[part] for part in parts))


def _check_codes(what: str, entry: Mapping[str, Any], offset: Tensor, scale: Tensor, codes: Tensor) -> None:
    if entry["dtype"] != "float32" or codes.dtype != torch.uint8 or codes.dim() != 2:
        raise ArtifactError(f"{what}: {codes.dtype} {list(codes.shape)} for {entry['dtype']!r}, in 8 bits allowed are "
                            "matrices of uint8 for float32")  # fmt: skip
    for values in (offset, scale):
        if values.dtype != torch.float32 or list(values.shape) != entry["shape"][:1]:
            raise ArtifactError(f"{what}: offset and scale must be lists of float32, one for each row")
    if not bool((scale > 0).all()) or not bool((offset.isfinite() & (offset + _CODES * scale).isfinite()).all()):
        raise ArtifactError(f"{what}: offset and scale must be finite, scale above 0")


def _declared_bytes(entry: Mapping[str, Any], array: Tensor | None) -> int:
    """Size of the unpacked tensor; stored dense it has been read already."""
    size = (
        array.element_size() if entry["storage"] == "dense" and array is not None else _TYPES[entry["dtype"]].itemsize
    )
    return math.prod(entry["shape"]) * size


def _restore(path: Path, name: str, entry: Mapping[str, Any], stored: Mapping[str, Tensor]) -> Tensor:
    if entry["storage"] == "dense":
        return stored[name]
    if entry["storage"] == "half":
        return stored[name].to(_TYPES[entry["dtype"]])
    if entry["storage"] == "affine":
        offset, scale, codes = (stored[part] for part in _parts(name, entry))
        # In one rounding: eight bits times the scale's twelve are exact in float32.
        return (codes.float() * scale[:, None]).add_(offset[:, None])
    gaps, values = stored[f"{name}.gaps"].numpy().astype(np.int64), stored[f"{name}.values"]
    places = np.cumsum(gaps) - 1
    numel = math.prod(entry["shape"])
    if len(gaps) and (gaps.min() < 1 or places[-1] >= numel):
        raise ArtifactError(f"{path}: tensor {name!r}: entries lie outside its {numel} places, or twice at one")
    flat = torch.zeros(numel, dtype=values.dtype)
    flat[torch.from_numpy(places)] = values
    return flat.view(entry["shape"])

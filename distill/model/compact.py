"""Compact storage of finished sparse models: non-zero entries with the distance from one to the next.

A tensor with few non-zeros is stored as `{name}.gaps` (uint8 or uint16, whichever gives the smaller file) and
`{name}.values`: entry n lies at the sum of the first n + 1 gaps, counted from position -1. A gap too wide for its
integer is bridged by explicit zeros, so no escape code is needed. Tables named in `half` (bigram) become float16,
the rest stays as it is. The header says shape, type and storage of every tensor; all of it is checked against the
stored arrays before anything of the declared size is allocated.
"""

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

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

_TYPES = {str(t).removeprefix("torch."): t for t in (torch.float64, torch.float32, torch.float16, torch.bfloat16)}
_GAP_TYPES = (np.uint8, np.uint16)


def save_compact(path: str | Path, state_dict: Mapping[str, Tensor], *, half: Collection[str] = ("bigram",)) -> None:
    """Write the tensors of a model to one compact file, in one step.

    Arguments:
        path: file to write, by convention `model.sparse.safetensors`.
        state_dict: names to tensors; sparse ones come back exactly (a negative zero as zero).
        half: last parts of the names of tensors that are rounded to float16 (3 digits).

    Raises `ArtifactError` for a tensor in `half` with values beyond float16's 65504.
    """
    stored: dict[str, Tensor] = {}
    declared: dict[str, dict[str, Any]] = {}
    for name, tensor in state_dict.items():
        entry = {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
        flat = tensor.detach().cpu().reshape(-1)
        nonzero = int(torch.count_nonzero(flat))
        if name.split(".")[-1] in half and tensor.is_floating_point():
            entry["storage"] = "half"
            stored[name] = _as_half(path, name, tensor.detach().cpu())
        elif entry["dtype"] in _TYPES and nonzero < DENSE_ABOVE * flat.numel():
            entry["storage"] = "sparse"
            stored[f"{name}.gaps"], stored[f"{name}.values"] = _pack(flat)
        else:
            entry["storage"] = "dense"
            stored[name] = tensor.detach().cpu()
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
        needed |= {f"{name}.gaps", f"{name}.values"} if entry["storage"] == "sparse" else {name}
        total += _declared_bytes(entry, stored.get(name))
        if total > path.stat().st_size * MOST_UNPACKED + FREE_BYTES:
            raise ArtifactError(f"{path}: declares {total} bytes of tensors, more than {MOST_UNPACKED} times its size")
        if total > max_bytes:
            raise ArtifactError(f"{path}: declares more than {max_bytes} bytes of tensors (max_bytes)")
    if needed != set(stored):
        raise ArtifactError(f"{path}: holds the undeclared tensor {min(set(stored) - needed)!r}")
    return {name: _restore(path, name, entry, stored) for name, entry in declared.items()}


def _as_half(path: str | Path, name: str, tensor: Tensor) -> Tensor:
    rounded = tensor.to(torch.float16)
    if bool((rounded.isinf() & ~tensor.isinf()).any()):
        raise ArtifactError(f"{path}: {name} has values beyond 65504, it cannot be stored as float16 (half)")
    return rounded


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
    if not isinstance(entry, dict) or entry.get("storage") not in ("sparse", "half", "dense"):
        raise ArtifactError(f"{what}: 'storage' must be sparse, half or dense")
    shape = entry.get("shape")
    if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
        raise ArtifactError(f"{what}: shape {shape!r}, allowed are lists of sizes from 0")
    if entry["storage"] != "dense" and entry.get("dtype") not in _TYPES:
        raise ArtifactError(f"{what}: dtype {entry.get('dtype')!r}, allowed are {', '.join(_TYPES)}")
    parts = (f"{name}.gaps", f"{name}.values") if entry["storage"] == "sparse" else (name,)
    for part in parts:
        if part not in stored:
            raise ArtifactError(f"{what}: the file holds no {part!r}")
    array = stored[parts[-1]]
    if entry["storage"] != "half" and str(array.dtype).removeprefix("torch.") != entry.get("dtype"):
        raise ArtifactError(f"{what}: declared as {entry.get('dtype')!r}, stored as {array.dtype}")
    if entry["storage"] == "sparse":
        gaps = stored[parts[0]]
        if gaps.dtype not in (torch.uint8, torch.uint16) or gaps.dim() != 1 or gaps.shape != array.shape:
            raise ArtifactError(f"{what}: gaps and values must be two lists of equal length, gaps of uint8 or uint16")
    elif list(array.shape) != shape or (entry["storage"] == "half" and array.dtype != torch.float16):
        raise ArtifactError(f"{what}: declared with shape {shape}, stored as {array.dtype} {list(array.shape)}")


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
    gaps, values = stored[f"{name}.gaps"].numpy().astype(np.int64), stored[f"{name}.values"]
    places = np.cumsum(gaps) - 1
    numel = math.prod(entry["shape"])
    if len(gaps) and (gaps.min() < 1 or places[-1] >= numel):
        raise ArtifactError(f"{path}: tensor {name!r}: entries lie outside its {numel} places, or twice at one")
    flat = torch.zeros(numel, dtype=values.dtype)
    flat[torch.from_numpy(places)] = values
    return flat.view(entry["shape"])

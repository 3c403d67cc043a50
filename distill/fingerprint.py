"""One number for what something is made of; and the error of everything that reads or writes artifacts."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


class ArtifactError(ValueError):
    """A file or folder that cannot be read or must not be written, said in one line that names it."""


def fingerprint(value: Mapping[str, Any]) -> str:
    """sha256 (hex) of names and values, whatever the order of the names.

    Arguments:
        value: names to tensors (dtype, shape and bytes count), arrays, str, int, float, bool, None, paths, or mappings
            and sequences of these; a tuple counts as the list that JSON would make of it.

    Raises `ArtifactError` for a value of another type.
    """
    digest = hashlib.sha256()
    _feed(digest, value, "value")
    return digest.hexdigest()


def _feed(digest: Any, value: Any, where: str) -> None:
    """Hash a value behind its type and length, so that no two values run into each other."""
    if isinstance(value, Mapping):
        digest.update(f"map {len(value)};".encode())
        for name in sorted(value):
            _feed(digest, name, where)
            _feed(digest, value[name], f"{where}.{name}")
    elif isinstance(value, list | tuple):
        digest.update(f"list {len(value)};".encode())
        for index, item in enumerate(value):
            _feed(digest, item, f"{where}[{index}]")
    elif isinstance(value, Tensor | np.ndarray):
        tensor = value if isinstance(value, Tensor) else torch.tensor(value)
        digest.update(f"tensor {tensor.dtype} {list(tensor.shape)};".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        if flat.numel() < 2:  # of which torch keeps any stride, even 0
            flat = torch.empty_like(flat).copy_(flat) if flat.stride() == (1,) else flat.new_tensor(flat.tolist())
        digest.update(flat.view(torch.uint8).numpy().data)
    elif value is None or isinstance(value, str | int | float | Path | np.generic):
        plain = value.item() if isinstance(value, np.generic) else value
        text = str(plain).encode(errors="surrogatepass")
        digest.update(f"{type(plain).__name__ if not isinstance(plain, Path) else 'str'} {len(text)};".encode() + text)
    else:
        raise ArtifactError(f"{where}: a fingerprint takes tensors, text, numbers and None, got {type(value).__name__}")

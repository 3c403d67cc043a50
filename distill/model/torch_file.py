"""Files of `torch.save` that somebody else made: read without trusting them, and written for programs that need them.

Nothing but tensors and plain containers comes out of one (`torch.load(weights_only=True)`), and nothing of a size that
the file does not have: a packed archive, or a tensor that claims more entries than are stored, is refused before any
of it is used. Tensors are mapped, not read. What this package writes for itself is safetensors and JSON.
"""

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.artifact import ArtifactError

MAX_BYTES = 16 * 2**30
"""Largest file that is read unless told otherwise."""
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_DAMAGE = (RuntimeError, EOFError, ValueError, LookupError, AttributeError, TypeError, OverflowError, AssertionError)
"""What `torch.load` raises for a damaged file, besides `UnpicklingError`."""


def load_torch(path: str | Path, *, what: str, max_bytes: int = MAX_BYTES) -> Any:
    """The content of a file by `torch.save`, its tensors on the CPU and mapped from the file.

    Arguments:
        what: what the file should be, for the message ("checkpoint").
        max_bytes: largest size taken.

    Raises `ArtifactError` that names the file where it is missing, too large, no archive of `torch.save`, cut, damaged
    or holds anything but tensors, numbers, text and containers of these.
    """
    path = Path(path)
    if not path.is_file():
        raise ArtifactError(f"{path}: no such {what} file")
    size = path.stat().st_size
    if size > max_bytes:
        raise ArtifactError(f"{path}: {what} of {size} bytes, allowed are {max_bytes}")
    try:
        if not zipfile.is_zipfile(path):
            raise ArtifactError(f"{path}: is cut or no {what}; allowed are torch.save's archives (torch 1.6 and later)")
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            # torch writes no checksums where it is told so; there is nothing to hold such a file against.
            checked = any(entry.CRC for entry in entries)
            packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
            damaged = archive.testzip() if checked and not packed else None
    except ArtifactError:
        raise
    except (zipfile.BadZipFile, ValueError, NotImplementedError, LookupError, OSError, EOFError, RuntimeError) as error:
        raise ArtifactError(f"{path}: is no readable {what}: {error}") from None
    # torch.save packs nothing; what is packed could unfold to any size.
    if packed or sum(entry.file_size for entry in entries) > size:
        raise ArtifactError(f"{path}: is a packed archive; allowed are archives as torch.save writes them")
    if damaged is not None:
        raise ArtifactError(f"{path}: its entry {damaged!r} is not what was written, the file was changed or damaged")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        # Told by its name: its class lies in a module that is not imported here, so that nothing else can be unpickled.
        if not isinstance(error, _DAMAGE) and type(error).__name__ != "UnpicklingError":
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ArtifactError(
            f"{path}: is no readable {what}, it is damaged or holds more than weights: {reason}"
        ) from None


def check_stored(path: str | Path, name: str, value: Any) -> Tensor:
    """`value` if it is a dense tensor on the CPU with an entry in the file for each of its own.

    Raises `ArtifactError` naming file and tensor.
    """
    if not isinstance(value, Tensor):
        raise ArtifactError(f"{path}: {name!r} is of type {type(value).__name__}, allowed are tensors")
    if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
        raise ArtifactError(f"{path}: {name!r} is a {value.layout} tensor on {value.device}, allowed are dense ones")
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise ArtifactError(
            f"{path}: {name!r} has shape {tuple(value.shape)}, but the file holds "
            f"{value.untyped_storage().nbytes()} bytes of it"
        )
    return value


def save_torch(path: str | Path, value: Mapping[str, Any]) -> None:
    """Writes tensors and plain containers for a program that reads nothing but `torch.save`.

    The file is not written in one step: write into a folder by `distill.artifact.fresh_folder`.
    """
    torch.save(dict(value), path)

"""Which set of operations a process uses: the plain ones in torch, or where it can the compiled ones."""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from distill.model import kernels
from distill.model.kernels import cuda

PATHS = ("auto", "plain")
_path = "auto"


def set_path(path: str) -> None:
    """Chooses the operations: auto takes the compiled ones where there are such, plain never. ValueError for others."""
    global _path
    if path not in PATHS:
        raise ValueError(f"path: {path!r} is no set of operations; allowed are {', '.join(PATHS)}")
    _path = path


def plain() -> bool:
    """Whether only plain operations are to be used."""
    return _path == "plain"


def native(x: Tensor) -> bool:
    """Whether the compiled operations are to be used on a tensor like this one: float32 on a CPU."""
    fits = x.dtype == torch.float32 and x.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
    fits = fits and not isinstance(x, DTensor)  # its entries are spread over processes
    return fits and _path == "auto" and kernels.available()


def triton(x: Tensor) -> bool:
    """Whether the operations for a CUDA device are to be used on a tensor like this one."""
    return _path == "auto" and cuda.usable(x)

"""Exact L0 projection, compiled: a sampled bracket, one pass that counts and collects, one that sets to zero."""

import math

import torch
from torch import Tensor

from distill.model.kernels.build import call, threads, workspace

_CHUNK = 1 << 14


def magnitude_cut(x: Tensor, count: int) -> tuple[float, int, int]:
    """Where to cut `x` (float32, CPU, contiguous) so that the `count` entries of largest magnitude stay.

    Arguments:
        x: the entries, of any sign and shape; NaN counts as the largest.
        count: how many stay, 0 to numel.

    Returns (value, stay, equal): entries above `value` in magnitude stay, and the first `stay` of the `equal` many
    that are equal to it. Value 0: all non-zero entries stay. Infinity: none.
    """
    n = x.numel()
    assert 0 <= count <= n and x.dtype == torch.float32, f"{count} of {n}, {x.dtype}"
    if count == 0:
        return math.inf, 0, 0
    if count == n:
        return 0.0, 0, 0
    pieces = -(-n // _CHUNK)
    counts = torch.empty(2 * pieces, dtype=torch.int64)
    value, ties = torch.empty(1), torch.empty(2, dtype=torch.int64)
    found = workspace(pieces * (_CHUNK + 64))
    call("projection_cut", x.detach(), n, count, found, counts, value, ties[:1], ties[1:], threads(n))
    stay, equal = ties.tolist()
    return float(value), stay, equal


def shrink_(x: Tensor, value: float, stay: int, equal: int) -> None:
    """Sets to zero, in place, what `magnitude_cut` says is to go: float32, CPU, contiguous."""
    data = x.detach()
    if value == 0:
        return
    if math.isinf(value) and stay == 0:
        data.zero_()
        return
    call("projection_shrink", data, data.numel(), value, stay, equal, threads(data.numel()))
    torch.autograd.graph.increment_version(data)


def project_(x: Tensor, fraction: float) -> None:
    """Keeps the round(fraction * numel) entries of largest magnitude, sets the others to zero, in place [G A.2].

    Ties go to the lowest flat index. float32, CPU, contiguous.

    Arguments:
        x: a tensor or parameter of any shape.
        fraction: share of the entries that stay. ValueError outside [0, 1].
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction: got {fraction}, allowed is 0 to 1")
    shrink_(x, *magnitude_cut(x, round(fraction * x.numel())))

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


def floor_entries(x: Tensor, cut: float, floor: int, axis: int) -> tuple[Tensor, Tensor]:
    """The `floor` largest entries of each unit of which fewer are above `cut`, ties at the lowest index.

    Arguments:
        x: a matrix (float32, CPU, contiguous).
        cut: a magnitude.
        floor: entries per unit, 1 and more.
        axis: 0 when rows are the units, 1 for columns.

    Returns flat places and values, without zeros.
    """
    rows, columns = x.shape
    most = x.shape[axis] * floor
    at, values, found = torch.empty(most, dtype=torch.int64), torch.empty(most), torch.empty(1, dtype=torch.int64)
    call("projection_floor", x.detach(), rows, columns, axis, floor, cut, at, values, found, threads(x.numel()))
    return at[: int(found)], values[: int(found)]


def keep_(x: Tensor, count: int, *, floor: int = 0, axis: int | None = None) -> tuple[float, int]:
    """Keeps the `count` entries of largest magnitude and the `floor` largest of each unit, the others become zero.

    Arguments:
        x: float32, CPU, contiguous; a matrix where there is a floor.
        count: 0 to numel; ties go to the lowest flat index.
        floor: entries that stay in each unit at least, as far as it has non-zero ones; 0 is off.
        axis: 0 when rows are the units, 1 for columns.

    Returns the magnitude of the cut, and the entries that are not zero afterwards.
    """
    value, stay, equal = magnitude_cut(x, count)
    saved = floor_entries(x, value, floor, axis) if floor and axis is not None and value > 0 else None
    shrink_(x, value, stay, equal)
    if value == 0:
        return value, int(torch.count_nonzero(x.detach()))
    if saved is None:
        return value, count
    at, values = saved
    flat = x.detach().view(-1)
    back = int(torch.count_nonzero(flat[at] == 0))
    flat[at] = values
    return value, count + back


def project_(x: Tensor, fraction: float, *, floor: int = 0, axis: int | None = None) -> int:
    """Keeps the round(fraction * numel) entries of largest magnitude, sets the others to zero, in place [G A.2].

    Ties go to the lowest flat index. float32, CPU, contiguous. Arguments beside these as in `keep_`.

    Arguments:
        x: a tensor or parameter of any shape.
        fraction: share of the entries that stay. ValueError outside [0, 1].

    Returns the entries that are not zero afterwards.
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction: got {fraction}, allowed is 0 to 1")
    return keep_(x, round(fraction * x.numel()), floor=floor, axis=axis)[1]

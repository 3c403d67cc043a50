"""The projection by counting: on any device, and for tensors that are spread over processes.

The cut that leaves exactly `count` entries is searched from that of the step before, which it differs little from: a
few passes count how many entries reach a bound, until few lie between two bounds; those are sorted, and the cut is
found among them. Magnitudes are compared as the integers that their bits spell (the same order, and the search ends
for certain). Of a spread tensor every process holds a block: counts are summed over the processes, which all take the
same turns, and ties are broken by the place in the whole tensor. So the result is that of `sparsity.project_` on the
whole tensor, entry by entry, on every process.
"""

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Int
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from distill.model.kernels import cuda

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_SPREAD = 1 / 64  # how far around the last cut it is looked for first, as a share of it
_FEW = 1024  # entries between two bounds that are sorted without more counting, or
_SHARE = 256  # the number of entries over this
_BRANCHES = 256  # bounds that are counted at once where counting is cheap
_SAMPLE = 1 << 16  # entries looked at for a first guess


class Cut(NamedTuple):
    """Where a tensor is cut so that exactly so many entries stay."""

    value: float
    """Every entry of larger magnitude stays; 0: all non-zero entries stay; infinity: none."""
    stay: int
    """Of the entries equal to it the first so many stay."""
    equal: int
    """Entries equal to it."""


@dataclass(frozen=True, kw_only=True)
class Block:
    """The part of a tensor that this process holds: a contiguous range along every axis."""

    shape: tuple[int, ...]
    """Of the whole tensor."""
    offset: tuple[int, ...]
    """Where the block begins along each axis."""
    groups: tuple[tuple[int, dist.ProcessGroup], ...] = ()
    """Axes that are split, each with the processes it is split over; a block that several processes hold alike is not
    split over these. Empty: the block is the whole tensor."""

    @classmethod
    def whole(cls, x: Tensor) -> "Block":
        """That of a tensor which is not spread."""
        return cls(shape=tuple(x.shape), offset=(0,) * x.dim())

    @classmethod
    def of(cls, x: DTensor) -> "Block":
        """That of a distributed tensor, such as `fully_shard` makes; ValueError for other than Shard and Replicate."""
        sizes, offset = list(x.shape), [0] * x.dim()
        groups = []
        place = x.device_mesh.get_coordinate()
        assert place is not None, "this process is not part of the tensor's mesh"
        for number, placement in enumerate(x.placements):
            if type(placement) is Replicate:
                continue
            if type(placement) is not Shard:
                raise ValueError(f"weight: placed by {type(placement).__name__}, allowed are Shard and Replicate")
            axis, parts = placement.dim % x.dim(), x.device_mesh.size(number)
            chunk = -(-sizes[axis] // parts)
            begin = min(place[number] * chunk, sizes[axis])
            offset[axis] += begin
            sizes[axis] = min(chunk, sizes[axis] - begin)
            groups.append((axis, x.device_mesh.get_group(number)))
        local = tuple(x.to_local().shape)
        assert local == tuple(sizes), f"holds {local}, expected {tuple(sizes)}"
        return cls(shape=tuple(x.shape), offset=tuple(offset), groups=tuple(groups))

    def numel(self) -> int:
        """Entries of the whole tensor."""
        return math.prod(self.shape)

    def sum(self, counts: Tensor) -> Tensor:
        """Counts of the whole tensor from those of the blocks, in place."""
        for _, group in self.groups:
            dist.all_reduce(counts, group=group)
        return counts

    def places(self, local: Int[Tensor, " n"], shape: Sequence[int]) -> Int[Tensor, " n"]:
        """Flat places in the whole tensor of flat places in the block, which has the given shape."""
        found, stride = torch.zeros_like(local), 1
        for axis in reversed(range(len(shape))):
            found += (local % shape[axis] + self.offset[axis]) * stride
            local = local // shape[axis]
            stride *= self.shape[axis]
        return found


@dataclass
class Thresholds:
    """Projects tensors again and again, each search starting from the last cut of the same tensor."""

    last: dict[Hashable, float] = field(default_factory=dict)
    """The cut of each tensor, as a magnitude."""

    def project_(
        self, key: Hashable, weight: Tensor, fraction: float, *, floor: int = 0, axis: int | None = None
    ) -> int:
        """As `project_counted_`; `key` (a name, a parameter) tells the tensors apart."""
        kept, cut = _project(weight, fraction, floor, axis, self.last.get(key))
        if 0 < cut < math.inf:
            self.last[key] = cut
        return kept


def project_counted_(weight: Tensor, fraction: float, *, floor: int = 0, axis: int | None = None) -> int:
    """As `sparsity.project_`, for a tensor on any device, or a DTensor: each of its processes calls it then.

    Returns the non-zeros left in the whole tensor.
    """
    return _project(weight, fraction, floor, axis, None)[0]


def project_sharded_(weight: DTensor, fraction: float, floor: int = 0, axis: int | None = None) -> int:
    """As `project_counted_`, for a tensor spread over processes."""
    return _project(weight, fraction, floor, axis, None)[0]


def _project(weight: Tensor, fraction: float, floor: int, axis: int | None, start: float | None) -> tuple[int, float]:
    data = weight.detach()
    if isinstance(data, DTensor):
        return project_block_(data.to_local(), Block.of(data), fraction, floor=floor, axis=axis, start=start)
    return project_block_(data, Block.whole(data), fraction, floor=floor, axis=axis, start=start)


@torch.no_grad()
def project_block_(
    x: Tensor,
    block: Block,
    fraction: float,
    *,
    floor: int = 0,
    axis: int | None = None,
    start: float | None = None,
) -> tuple[int, float]:
    """Projects this process' part of a tensor, in place, by what `sparsity.project_` would do to the whole tensor.

    Every process of the block's groups has to call it, with the same arguments but `x` and `block`.

    Arguments:
        x: the part.
        block: which part it is.
        fraction, floor, axis: as of `sparsity.project_`.
        start: a magnitude near the cut, such as the last one; none: guessed from a sample.

    Returns the non-zeros left in the whole tensor, and the magnitude it was cut at (0: none was cut, infinity: all).
    Raises ValueError for a fraction, floor or axis that is not possible.
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction: got {fraction}, allowed is 0 to 1")
    if floor and (axis not in (0, 1) or len(block.shape) != 2 or not 0 < floor <= block.shape[1 - axis]):
        raise ValueError(
            f"floor: got {floor} on axis {axis} of a tensor {block.shape}, "
            "allowed is 0 to the length of a row (axis 0) or column (axis 1) of a matrix"
        )
    count = round(fraction * block.numel())
    cut = Cut(0.0, 0, 0)
    if count < block.numel():
        cut = search_cut(x, count, block=block, start=start)
        saved = None
        if floor and axis is not None and cut.value > 0:
            saved = _floor_entries(x, cut, floor, axis, block)
        _shrink_(x, cut, block)
        if saved is not None:
            (x if axis == 0 else x.T)[saved[0], saved[1]] = saved[2]
    return int(block.sum(torch.count_nonzero(x).reshape(1))), cut.value


def _by_triton(x: Tensor, block: Block) -> bool:
    return not block.groups and x.is_contiguous() and x.numel() > 0 and cuda.usable(x)


# --- search ----------------------------------------------------------------------------------------------------------


def _keys(x: Tensor) -> Tensor:
    """Integers in the order of the magnitudes; NaN is the largest."""
    return x.abs().contiguous().view(_INTEGERS[x.element_size()])


def _as_key(value: float, like: Tensor) -> int:
    return int(torch.tensor(value, dtype=like.dtype).view(_INTEGERS[like.element_size()]))


def _as_value(key: int, like: Tensor) -> float:
    return float(torch.tensor(key, dtype=_INTEGERS[like.element_size()]).view(like.dtype))


def search_cut(x: Tensor, count: int, *, block: Block | None = None, start: float | None = None) -> Cut:
    """Where to cut a tensor so that exactly `count` entries stay: as `sparsity.magnitude_threshold`, by counting.

    On a CUDA device a tensor that is not spread is searched in Triton, where that is installed; the value may lie just
    below the smallest entry that stays then.

    Arguments:
        x: floating point tensor of any shape, sign and device; this process' part of one, where `block` is given.
        count: entries of the whole tensor that stay, 0 to numel.
        block: which part `x` is; none: the whole.
        start: a magnitude near the cut; none: guessed from a sample.
    """
    block = block or Block.whole(x)
    total = block.numel()
    assert 0 <= count <= total, f"{count} of {total}"
    if count == 0:
        return Cut(math.inf, 0, 0)
    if _by_triton(x, block):
        return Cut(*cuda.magnitude_cut(x, count, start))
    flat = _keys(x).reshape(-1)
    low, from_low, high, above = _bracket(flat, count, start, block, x)
    if high - low > 1:
        inside = flat[(flat >= low) & (flat < high)].long().sort().values
        low = _largest(inside, count - above, low, high, block)
        reach = torch.searchsorted(inside, torch.tensor([low, low + 1], device=inside.device))
        from_low, above = (block.sum(len(inside) - reach) + above).tolist()
    return Cut(_as_value(low, x), count - above, from_low - above) if low else Cut(0.0, 0, 0)


def _guess(flat: Tensor, count: int, block: Block, like: Tensor) -> float:
    """The cut of a sample: of every process' block in proportion to its size, so that all guess alike."""
    step = -(-block.numel() // _SAMPLE)
    sample = flat[::step].long().sort().values
    size = int(block.sum(torch.tensor([len(sample)], device=flat.device)))
    rank = min(max(1, round(count * size / block.numel())), size)
    return _as_value(_largest(sample, rank, 0, torch.iinfo(flat.dtype).max, block), like)


def _bracket(flat: Tensor, count: int, start: float | None, block: Block, like: Tensor) -> tuple[int, int, int, int]:
    """Bounds low < high that `count` or more, and fewer, entries reach, and how many do; few lie between them."""
    low, from_low = 0, block.numel()
    high, from_high = torch.iinfo(flat.dtype).max, 0
    few = max(_FEW, block.numel() // _SHARE)
    if from_low <= few:
        return low, from_low, high, from_high
    guess, spread, turn = start or _guess(flat, count, block, like), _SPREAD, 0
    while high - low > 1 and from_low - from_high > few:
        probes = [guess * (1 - spread), guess * (1 + spread)]
        bounds = [_as_key(probe, like) for probe in probes] if turn % 4 < 3 else [low + (high - low) // 2]
        # Zeros are a crowd of their own: when the first look was in vain, whether there are enough others is asked.
        bounds += [1] if turn == 1 and low == 0 else []
        bounds = sorted({min(max(bound, low + 1), high - 1) for bound in bounds})
        reached = torch.stack([torch.count_nonzero(flat >= bound) for bound in bounds])
        for bound, found in zip(bounds, block.sum(reached).tolist(), strict=True):
            if found >= count:
                low, from_low = bound, found
            elif bound < high:
                high, from_high = bound, found
        turn += 1
        left, right = _as_value(low, like), _as_value(high, like)
        if low > 1 and math.isfinite(right):
            guess = left + (right - left) * (from_low - count) / (from_low - from_high)
            spread = max(spread / 8, 1e-6)
        else:
            # The cut lies outside of what was looked at: further out, from the side that is known.
            guess, spread = (left if low > 1 else right), min(8 * spread, 0.9)
    return low, from_low, high, from_high


def _largest(ordered: Int[Tensor, " n"], rank: int, low: int, high: int, block: Block) -> int:
    """The `rank`-th largest of the integers that all processes hold, each of them its own in order; in [low, high)."""
    if not block.groups:
        return int(ordered[len(ordered) - rank])
    return _search(
        lambda bounds: block.sum(len(ordered) - torch.searchsorted(ordered, bounds)), rank, low, high, ordered.device
    )


def _search(reaching: Callable[[Tensor], Tensor], rank: int, low: int, high: int, device: torch.device) -> int:
    """The largest integer in [low, high) that `rank` or more reach; `reaching` counts for many bounds at once."""
    while high - low > 1:
        step = -(-(high - low) // _BRANCHES)
        bounds = range(low + step, high, step)
        counts = reaching(torch.tensor(list(bounds), device=device)).tolist()
        enough = sum(found >= rank for found in counts)
        if enough < len(bounds):
            high = bounds[enough]
        if enough:
            low = bounds[enough - 1]
    return low


# --- what stays ------------------------------------------------------------------------------------------------------


def _shrink_(x: Tensor, cut: Cut, block: Block) -> None:
    """Zeroes what lies below the cut, and of the entries equal to it all but the first `stay` of the whole tensor."""
    if cut.value == 0:
        return
    if math.isinf(cut.value) and cut.stay == 0:
        x.zero_()
        return
    if _by_triton(x, block):
        cuda.shrink_(x, *cut)
        return
    keys, key = _keys(x), _as_key(cut.value, x)
    gone = keys < key
    if cut.equal > cut.stay:
        tied = (keys == key).reshape(-1).nonzero().reshape(-1)
        places = block.places(tied, x.shape)
        if block.groups:
            surplus = cut.equal - cut.stay
            bound = _largest(places, surplus, 0, block.numel(), block)
            surplus_here = tied[places >= bound]
        else:
            surplus_here = tied[cut.stay :]
        gone.view(-1)[surplus_here] = True
    x.masked_fill_(gone, 0.0)


def _floor_entries(x: Tensor, cut: Cut, floor: int, axis: int, block: Block) -> tuple[Tensor, Tensor, Tensor] | None:
    """Of the `floor` largest entries of each unit that the cut leaves with fewer, those of this block.

    Returns (units, positions, values): rows and columns of `x`, or of its transpose for axis 1.
    """
    keys = _keys(x)
    across = [group for split, group in block.groups if split == 1 - axis]
    held = (keys > _as_key(cut.value, x)).sum(1 - axis)
    for group in across:
        dist.all_reduce(held, group=group)
    # Those that share units with this process see the same ones short, so all of them go on or none.
    short = (held < floor).nonzero().reshape(-1)
    if len(short) == 0:
        return None
    rows = (keys if axis == 0 else keys.T)[short].long()
    begin, width = block.offset[1 - axis], rows.shape[1]
    # Most equal entries first, by place: -1 stands for none.
    size, at = rows.sort(dim=1, descending=True, stable=True)
    size, at = size[:, :floor], at[:, :floor] + begin
    missing = floor - size.shape[1]
    if missing > 0:
        size = torch.nn.functional.pad(size, (0, missing), value=-1)
        at = torch.nn.functional.pad(at, (0, missing), value=-1)
    for group in across:
        size, at = (_beside(part, group) for part in (size, at))
    order = at.argsort(dim=1, stable=True)
    size, at = size.gather(1, order), at.gather(1, order)
    order = size.argsort(dim=1, descending=True, stable=True)[:, :floor]
    size, at = size.gather(1, order), at.gather(1, order) - begin
    local, column = ((size > 0) & (at >= 0) & (at < width)).nonzero(as_tuple=True)
    units, positions = short[local], at[local, column]
    return units, positions, (x if axis == 0 else x.T)[units, positions]


def _beside(part: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The parts of all processes of a group, side by side."""
    part = part.contiguous()
    found = [torch.empty_like(part) for _ in range(dist.get_world_size(group))]
    dist.all_gather(found, part, group=group)
    return torch.cat(found, 1)

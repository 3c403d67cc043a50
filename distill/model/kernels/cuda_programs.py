"""The Triton programs behind `distill.model.kernels.cuda`; importing this needs triton.

Magnitudes are compared as the integers that their bits spell as float32: the same order, whatever the type.
"""

from typing import no_type_check

# Triton comes with torch's CUDA builds alone.
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]

# All NaNs count as this one, the largest magnitude: then a bound above every magnitude is an integer too.
LARGEST = tl.constexpr(0x7F800001)
PROBES = tl.constexpr(16)
"""Bounds that one pass over the data counts."""


@triton.jit
@no_type_check
def _magnitude(value):
    return tl.minimum(value.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF, LARGEST)


@triton.jit
@no_type_check
def topk_forward(x, out, bits, width, k, expected, BLOCK: tl.constexpr):
    """One row: the cut is searched among its magnitudes in registers; what stays is written, and a bit for it.

    `expected`: where the cut lies in a row of normal numbers with mean square 1.
    """
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    value = tl.load(x + row * width + at, mask=at < width, other=0.0)
    size = _magnitude(value)
    # More than k entries reach `low`, fewer than k reach `high`, or no more search is needed: k of them reach it.
    low = tl.full((), 1, tl.int32)
    from_low = tl.sum((size >= 1).to(tl.int32))
    found = from_low <= k
    high = tl.where(found, 1, tl.max(size) + 1)
    from_high = tl.where(found, k, 0)
    wide = value.to(tl.float32)
    guess = expected * tl.sqrt(tl.sum(wide * wide) / width)
    turn = tl.full((), 0, tl.int32)
    while (high - low > 1) & (from_high < k):
        bound = guess.to(tl.int32, bitcast=True)
        # Not strictly inside (or not a number), or it has taken long: halve the bits.
        halve = (bound <= low) | (bound >= high) | (turn % 4 == 3)
        bound = tl.where(halve, low + (high - low) // 2, bound)
        count = tl.sum((size >= bound).to(tl.int32))
        more = count > k
        low = tl.where(more, bound, low)
        from_low = tl.where(more, count, from_low)
        high = tl.where(more, high, bound)
        from_high = tl.where(more, from_high, count)
        left = low.to(tl.float32, bitcast=True)
        right = high.to(tl.float32, bitcast=True)
        guess = left + (right - left) * ((from_low - k).to(tl.float32) / (from_low - from_high).to(tl.float32))
        turn += 1
    keep = size >= high
    if from_high < k:
        tied = size == low
        keep = keep | (tied & (tl.cumsum(tied.to(tl.int32), 0) <= k - from_high))
    tl.store(out + row * width + at, tl.where(keep, value, 0.0), mask=at < width)
    words = tl.reshape(keep.to(tl.int32), (BLOCK // 8, 8)) << tl.arange(0, 8)[None, :]
    byte, number = tl.arange(0, BLOCK // 8), (width + 7) // 8
    tl.store(bits + row * number + byte, tl.sum(words, 1).to(tl.uint8), mask=byte < number)


@triton.jit
@no_type_check
def topk_backward(grad, bits, out, width, BLOCK: tl.constexpr):
    """Of one row and block of columns the entries whose bit is set."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    byte = tl.load(bits + row * ((width + 7) // 8) + at // 8, mask=inside, other=0).to(tl.int32)
    value = tl.load(grad + row * width + at, mask=inside, other=0.0)
    tl.store(out + row * width + at, tl.where((byte >> (at % 8)) & 1 != 0, value, 0.0), mask=inside)


@triton.jit
@no_type_check
def count_reaching(x, n, state, bounds, counts, BLOCK: tl.constexpr):
    """counts[p] += entries whose magnitude reaches bounds[p]; nothing where the search is over (see `narrow`)."""
    if tl.load(state + 1) - tl.load(state) > 1:
        number, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
        probe = tl.arange(0, PROBES)
        total = tl.zeros((PROBES,), tl.int64)
        for block in range(number, tl.cdiv(n, BLOCK), programs):
            at = block * BLOCK + tl.arange(0, BLOCK)
            size = _magnitude(tl.load(x + at, mask=at < n, other=0.0))
            for p in tl.static_range(PROBES):
                found = tl.sum((size >= tl.load(bounds + p)).to(tl.int32))
                total += tl.where(probe == p, found, 0)
        tl.atomic_add(counts + probe, total)


@triton.jit
@no_type_check
def narrow(state, bounds, counts, count):
    """Draws the bracket together by what was counted, and spreads new bounds over it.

    state: low, high, and how many entries reach each: `count` or more, and fewer. Over when they are neighbours.
    """
    probe = tl.arange(0, PROBES)
    low, high = tl.load(state), tl.load(state + 1)
    from_low, from_high = tl.load(state + 2), tl.load(state + 3)
    if high - low > 1:
        bound, found = tl.load(bounds + probe).to(tl.int64), tl.load(counts + probe)
        enough = found >= count
        low = tl.maximum(low, tl.max(tl.where(enough, bound, low)))
        from_low = tl.minimum(from_low, tl.min(tl.where(enough, found, from_low)))
        high = tl.minimum(high, tl.min(tl.where(enough, high, bound)))
        from_high = tl.maximum(from_high, tl.max(tl.where(enough, from_high, found)))
        # Just so many reach `low`: all of these stay, and none that are equal to the number below it.
        exact = from_low == count
        high = tl.where(exact, low, high)
        from_high = tl.where(exact, count, from_high)
        low = tl.where(exact, low - 1, low)
        spread = low + (high - low) * (probe + 1).to(tl.int64) // (PROBES + 1)
        spread = tl.minimum(tl.maximum(spread, low + 1), tl.maximum(high - 1, low + 1))
        tl.store(bounds + probe, spread.to(tl.int32))
        tl.store(counts + probe, tl.zeros((PROBES,), tl.int64))
        tl.store(state, low)
        tl.store(state + 1, high)
        tl.store(state + 2, from_low)
        tl.store(state + 3, from_high)


@triton.jit
@no_type_check
def count_ties(x, n, key, ties, BLOCK: tl.constexpr):
    """Entries of each block whose magnitude is `key`."""
    block = tl.program_id(0).to(tl.int64)
    at = block * BLOCK + tl.arange(0, BLOCK)
    size = _magnitude(tl.load(x + at, mask=at < n, other=0.0))
    tl.store(ties + block, tl.sum(((size == key) & (at < n)).to(tl.int32)).to(tl.int64))


@triton.jit
@no_type_check
def shrink(x, n, key, before, stay, TIES: tl.constexpr, BLOCK: tl.constexpr):
    """Zeroes in place what does not reach `key`; with TIES of those equal to it all but the first `stay`, `before`
    being how many of them lie in the blocks before each."""
    block = tl.program_id(0).to(tl.int64)
    at = block * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at, mask=at < n, other=0.0)
    size = _magnitude(value)
    if TIES:
        tied = size == key
        rank = tl.load(before + block) + tl.cumsum(tied.to(tl.int32), 0)
        keep = (size > key) | (tied & (rank <= stay))
    else:
        keep = size >= key
    tl.store(x + at, tl.where(keep, value, 0.0), mask=at < n)

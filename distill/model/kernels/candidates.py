"""Linear maps and embeddings that are trained on a sample of their entries: no dense gradient of the weight is made.

A `Sample` names the entries of a weight that are trained: those that are not zero, and candidates to become so. While
`sample_` has attached it to the weight, the backward pass adds the gradient of just these entries to
`Sample.gradient`, and the weight's own `.grad` stays None. Compiled for float32 on a CPU; elsewhere torch works out the
dense gradient of one map at a time and picks the entries out of it.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from distill.model.kernels.build import call, threads
from distill.model.kernels.linear import Gradient, linear_maps
from distill.model.kernels.pattern import Pattern
from distill.model.kernels.projection import magnitude_cut, shrink_

# Columns that are looked at together: many, so that a row has places among them; a block of their activations (512 KiB)
# still fits into a core's cache.
_PANEL = 2048

_samples: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


@dataclass(frozen=True, kw_only=True, eq=False)
class Sample:
    """The entries of a matrix that are trained; n of them, in flat order."""

    rows: int
    columns: int
    flat: Int[Tensor, " n"] | None
    """Their places, for torch; None where there is an index."""
    index: "Index | None"
    """Their places, for the compiled operations."""
    values: Float[Tensor, " n"]
    """The entries of the weight, 0 for candidates."""
    gradient: Float[Tensor, " n"]
    """What the backward passes since `clear_` have added up."""

    @classmethod
    def of(cls, weight: Float[Tensor, "o i"], places: Int[Tensor, " n"], *, compiled: bool) -> "Sample":
        """The entries of `weight` at `places`: ascending flat places, among them all that are not zero.

        `compiled` is for a float32 weight on a CPU where `available()`.
        """
        rows, columns = weight.shape
        values = weight.detach().reshape(-1)[places]
        index = Index.of(places, rows, columns) if compiled else None
        flat = None if compiled else places
        return cls(rows=rows, columns=columns, flat=flat, index=index, values=values, gradient=torch.zeros_like(values))

    def places(self) -> Int[Tensor, " n"]:
        """The flat places, ascending."""
        if self.flat is not None:
            return self.flat
        assert self.index is not None
        row = torch.repeat_interleave(torch.arange(self.rows), self.index.start.diff().long())
        return row * self.columns + self.index.at

    def compiled(self, x: Tensor) -> bool:
        """Whether an operation on `x` takes the compiled way."""
        fits = x.dtype == torch.float32 and x.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
        return self.index is not None and fits and x.numel() > 0

    def take(self, gradient: Gradient, x: Float[Tensor, "*rows i"]) -> None:
        """Adds the gradient of the weight at the places, from that of a compiled map's output and what the map read."""
        assert self.index is not None, "places were not made for the compiled operations"
        blocks, place, bits = gradient.parts[:3]
        places = (self.index.panel_start, self.index.at, _PANEL)
        n = threads(gradient.tokens * (self.rows + self.columns))
        parts = (blocks, place, bits, self.rows, self.columns, x, gradient.tokens)
        call("candidates_gradient", *parts, *places, self.gradient, n)

    def clear_(self) -> None:
        """Sets the gradient to zero."""
        self.gradient.zero_()

    def squares(self) -> tuple[Tensor, Tensor]:
        """Sum of the gradient's squares: over all places, and over those whose entry is not zero; float64 scalars."""
        if self.index is None:
            square = self.gradient.double().square()
            return square.sum(), (square * (self.values != 0)).sum()
        sums = torch.empty(2, dtype=torch.float64)
        call("candidates_squares", self.gradient, self.values, self.values.numel(), sums)
        return sums[0], sums[1]


@dataclass(frozen=True, kw_only=True, eq=False)
class Index:
    """Places of a matrix row by row, int32, as candidates.cpp describes them."""

    start: Tensor
    at: Tensor
    panel_start: Tensor

    @classmethod
    def of(cls, places: Int[Tensor, " n"], rows: int, columns: int) -> "Index":
        """From ascending flat places."""
        start = torch.searchsorted(places, torch.arange(rows + 1) * columns).int()
        at = (places % columns).int()
        panel_start = torch.empty(rows, -(-columns // _PANEL) + 1, dtype=torch.int32)
        call("candidates_panels", start, at, rows, columns, _PANEL, panel_start)
        return cls(start=start, at=at, panel_start=panel_start)


def sample_(weight: Tensor, sample: Sample | None) -> None:
    """Attaches a sample to a weight, or with None takes it off: from then on the weight has a dense gradient again."""
    if sample is None:
        _samples.pop(weight, None)
    else:
        _samples[weight] = sample


def sample_of(weight: Tensor) -> Sample | None:
    """The sample attached to a weight that is about to be used where gradients are recorded."""
    if not _samples or not torch.is_grad_enabled() or not weight.requires_grad:
        return None
    return _samples.get(weight)


# --- forward and backward --------------------------------------------------------------------------------------------


class _SampledLinear(torch.autograd.Function):
    """The weight is an input so that autograd asks for a gradient; the answer goes into the sample instead."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, sample: Sample) -> Tensor:
        ctx.sample = sample
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        sample: Sample = ctx.sample
        grad = grads[0].to(weight.dtype)  # of another type where the forward pass was under autocast
        rows = grad.reshape(-1, sample.rows)
        dense = rows.T @ x.to(weight.dtype).reshape(-1, sample.columns)
        sample.gradient.add_(dense.view(-1)[sample.places()])
        grad_x = (grad @ weight).to(x.dtype) if ctx.needs_input_grad[0] else None
        return grad_x, None, rows.sum(0) if ctx.needs_input_grad[2] else None, None


class _SampledEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor, sample: Sample) -> Tensor:
        ctx.sample = sample
        ctx.save_for_backward(ids)
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, None]:
        (ids,) = ctx.saved_tensors
        sample: Sample = ctx.sample
        grad, flat = grads[0].reshape(-1, sample.columns).contiguous(), ids.reshape(-1).contiguous()
        if sample.index is not None and sample.compiled(grad):
            places = (sample.index.start, sample.index.at)
            call("candidates_rows", flat, flat.numel(), grad, sample.columns, *places, sample.gradient)
        else:
            dense = grad.new_zeros(sample.rows, sample.columns).index_add_(0, flat, grad)
            sample.gradient.add_(dense.view(-1)[sample.places()])
        return None, None, None


def sampled_linear(
    x: Float[Tensor, "*rows i"], weight: Float[Tensor, "o i"], bias: Float[Tensor, " o"] | None, sample: Sample
) -> Float[Tensor, "*rows o"]:
    """x W^T + b, with a backward pass that adds the weight's gradient at the places to `sample.gradient`.

    x and bias get their gradients as usual, the weight gets none. Differentiable once.
    """
    if sample.compiled(x):
        return linear_maps(x, [(weight, bias)], sparse=[True], keep=[None], sinks=[sample.take])[0]
    out = _SampledLinear.apply(x, weight, bias, sample)
    assert isinstance(out, Tensor)
    return out


def sampled_embedding(
    ids: Int[Tensor, "*rows"], weight: Float[Tensor, "V D"], sample: Sample
) -> Float[Tensor, "*rows D"]:
    """The rows of the weight that `ids` name, with a backward pass as that of `sampled_linear`."""
    out = _SampledEmbedding.apply(ids, weight, sample)
    assert isinstance(out, Tensor)
    return out


# --- projection ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def keep_largest_(sample: Sample, weight: Tensor, count: int, *, floor: int = 0, axis: int | None = None) -> int:
    """Keeps the `count` values of largest magnitude, sets the others to zero, and writes them into the weight.

    Ties go to the first place; every row (axis 0) or column (axis 1) keeps its own `floor` largest beyond these. As
    `distill.training.sparsity.project_` does it to a weight that is zero outside the sample, but only the places are
    looked at; the pattern of the weight is known afterwards. For a compiled sample. Returns the non-zero values left.
    """
    index, values, n = sample.index, sample.values, sample.values.numel()
    assert index is not None, "places were not made for the compiled operations"
    cut = magnitude_cut(values, min(count, n))
    saved = _floor(sample, index, cut[0], floor, axis) if floor and axis is not None and cut[0] > 0 else None
    shrink_(values, *cut)
    if saved is not None:
        values[saved[0]] = saved[1]
    return _emit(sample, index, weight)


def _floor(sample: Sample, index: Index, bound: float, floor: int, axis: int) -> tuple[Tensor, Tensor]:
    """Numbers of places, and values, that must stay in units that the cut leaves with too few."""
    units = sample.rows if axis == 0 else sample.columns
    counts, at = torch.empty(2 * units, dtype=torch.int32), torch.empty(units * floor, dtype=torch.int32)
    value, found = torch.empty(units * floor), torch.empty(1, dtype=torch.int64)
    where = (index.start, index.at, sample.rows, units, axis)
    call("candidates_floor", sample.values, *where, bound, floor, counts, at, value, found)
    return at[: int(found)].long(), value[: int(found)]


def _emit(sample: Sample, index: Index, weight: Tensor) -> int:
    """Writes the values into the weight and remembers its pattern; returns how many are not zero."""
    before, data = Pattern.of(weight), weight.detach()
    n = threads(data.numel())
    row_start = torch.empty_like(index.start)
    call("candidates_count", sample.values, index.start, sample.rows, row_start, n)
    kept = int(row_start[-1])
    column_start, place = (torch.empty(sample.columns + 1, dtype=torch.int32) for _ in range(2))
    by_row, by_column = (torch.empty(kept, dtype=torch.int64) for _ in range(2))
    where = (index.start, index.at, sample.rows, sample.columns)
    after = (row_start, by_row, column_start, by_column)
    call("candidates_emit", sample.values, *where, before.row_start, before.by_row, data, *after, place, n)
    torch.autograd.graph.increment_version(data)
    Pattern.remember(weight, *after)
    return kept

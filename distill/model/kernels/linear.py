"""Linear maps whose weight is mostly zeros, compiled: exact forward and gradients."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from distill.model.kernels.build import call, threads, workspace

DENSE_GRADIENT = 0.5
"""Share of non-zeros in the output's gradient from which on the weight gradient is a dense product."""
CROSSOVER = 0.25
"""Density of a weight up to which its products are made without the zeros.

Measured (256 to 1024 wide, 960 tokens, against oneDNN on AVX-512, one thread): both take equal time at 1/2 for small
matrices and at 1/3 for large ones; at 1/4 the sparse way takes about three quarters of the dense time.
"""
LEAST_SIDE = 32
"""Matrices that are narrower than this gain nothing."""

_BLOCK = 64
_kept: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _state(weight: Tensor) -> tuple[int, int, tuple[int, ...]]:
    """What is another once the weight has changed."""
    return weight.data_ptr(), weight._version, tuple(weight.shape)


@dataclass(frozen=True, kw_only=True, eq=False)
class Pattern:
    """A matrix without its zeros: the entries row by row and column by column.

    An entry is 8 bytes of one int64: the column (or row) as int32 and the value as float32.
    """

    rows: int
    columns: int
    row_start: Tensor
    by_row: Tensor
    column_start: Tensor
    by_column: Tensor

    @property
    def density(self) -> float:
        """Share of the entries that are not zero, in [0, 1]."""
        return self.by_row.numel() / max(self.rows * self.columns, 1)

    @classmethod
    def of(cls, weight: Float[Tensor, "o i"]) -> "Pattern":
        """The entries of `weight`, kept until it is changed in place (as torch counts changes: not through `.data`)."""
        if weight.is_inference():  # torch does not count its changes
            return cls._build(weight.contiguous())
        found = _kept.get(weight)
        if found is None or found[0] != _state(weight):
            found = _kept[weight] = (_state(weight), cls._build(weight.detach().contiguous()))
        return found[1]

    @classmethod
    def remember(
        cls,
        weight: Float[Tensor, "o i"],
        row_start: Int[Tensor, " o+1"],
        by_row: Int[Tensor, " n"],
        column_start: Int[Tensor, " i+1"],
        by_column: Int[Tensor, " n"],
    ) -> "Pattern":
        """Takes entries worked out elsewhere for what `of` would find in `weight` as it is now.

        Arguments:
            weight: its entries that are not zero are those given, which is not checked.
            row_start: int32; the entries of row r are those from row_start[r] up to row_start[r + 1].
            by_row: entries row after row, columns ascending.
            column_start: int32; as `row_start`, for columns.
            by_column: entries column after column, rows ascending.
        """
        assert row_start.dtype == column_start.dtype == torch.int32, f"{row_start.dtype}, {column_start.dtype}"
        assert by_row.dtype == by_column.dtype == torch.int64, f"{by_row.dtype}, {by_column.dtype}"
        rows, columns = weight.shape
        found = cls(
            rows=rows,
            columns=columns,
            row_start=row_start,
            by_row=by_row,
            column_start=column_start,
            by_column=by_column,
        )
        _kept[weight] = (_state(weight), found)
        return found

    @classmethod
    def _build(cls, weight: Tensor) -> "Pattern":
        rows, columns = weight.shape
        slabs = threads(weight.numel())
        row_start = torch.empty(rows + 1, dtype=torch.int32)
        column_start = torch.empty(columns + 1, dtype=torch.int32)
        place = torch.empty(slabs, columns, dtype=torch.int32)
        call("pattern_count", weight, rows, columns, row_start, slabs)
        by_row, by_column = (torch.empty(int(row_start[-1]), dtype=torch.int64) for _ in range(2))
        call("pattern_fill", weight, rows, columns, row_start, by_row, column_start, by_column, place, slabs, slabs)
        return cls(
            rows=rows,
            columns=columns,
            row_start=row_start,
            by_row=by_row,
            column_start=column_start,
            by_column=by_column,
        )


class _SparseLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, pattern: Pattern) -> Tensor:
        x = x.contiguous()
        ctx.pattern = pattern
        ctx.save_for_backward(x if weight.requires_grad else None)
        out = x.new_empty(*x.shape[:-1], pattern.rows)
        tokens = x.numel() // pattern.columns
        bias = None if bias is None else bias.contiguous()
        n = threads(tokens * (pattern.rows + pattern.columns))
        call(
            "linear_forward", pattern.row_start, pattern.by_row, pattern.rows, pattern.columns, x, bias, tokens, out, n
        )
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        assert not torch.is_grad_enabled(), "differentiable once: no create_graph"
        pattern: Pattern = ctx.pattern
        rows, columns = pattern.rows, pattern.columns
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        grad = grads[0].contiguous()
        tokens = grad.numel() // rows
        n = threads(tokens * (rows + columns))
        grad_x = grad.new_empty(*grad.shape[:-1], columns) if needs_x else None
        if not needs_weight:
            if grad_x is not None:
                by_column = (pattern.column_start, pattern.by_column)
                call("linear_forward", *by_column, columns, rows, grad, None, tokens, grad_x, n)
            return grad_x, None, grad.reshape(-1, rows).sum(0) if needs_bias else None, None
        (x,) = ctx.saved_tensors
        grad_weight, grad_bias = _weight_gradient(grad, x, pattern, grad_x)
        return grad_x, grad_weight, grad_bias if needs_bias else None, None


def _weight_gradient(grad: Tensor, x: Tensor, pattern: Pattern | None, grad_x: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gradients of weight and bias; fills `grad_x` where it is given, as the transposed gradient serves both."""
    rows, columns = grad.shape[-1], x.shape[-1]
    tokens = grad.numel() // rows
    n = threads(tokens * (rows + columns))
    count = -(-tokens // _BLOCK)
    blocks = workspace(count * rows * _BLOCK)
    place = torch.empty(count, rows, dtype=torch.int32)
    mask = torch.empty(count, rows, dtype=torch.int64)
    sums = grad.new_empty(count, rows)
    filled = torch.empty(count, dtype=torch.int64)
    by_column = (None, None) if pattern is None else (pattern.column_start, pattern.by_column)
    call("linear_backward", *by_column, rows, columns, grad, tokens, blocks, place, mask, sums, filled, grad_x, n)
    if int(filled.sum()) > DENSE_GRADIENT * grad.numel():
        grad_weight = _dense_product(grad.reshape(-1, rows), x.reshape(-1, columns))
    else:
        grad_weight = grad.new_empty(rows, columns)
        call("linear_weight", blocks, place, mask, rows, columns, x, tokens, grad_weight, n)
    return grad_weight, sums.sum(0)


def weight_gradient(
    grad: Float[Tensor, "*rows o"], x: Float[Tensor, "*rows i"]
) -> tuple[Float[Tensor, "o i"], Float[Tensor, " o"]]:
    """Gradients of weight and bias of a linear map, sparse or not, for float32 on a CPU where `available()`.

    grad^T x costs in proportion to the non-zeros of `grad`, which behind an AbsTopK are few; a `grad` that is not
    mostly zeros is multiplied by oneDNN.

    Arguments:
        grad: gradient of the output.
        x: input of the map.
    """
    assert grad.numel() > 0 and x.numel() > 0, f"{tuple(grad.shape)}, {tuple(x.shape)}"
    return _weight_gradient(grad.contiguous(), x.contiguous(), None, None)


def worth_it(o: int, i: int, density: float) -> bool:
    """Whether `sparse_linear` is faster than a dense product for a weight (o, i) of that share of non-zeros."""
    return density <= CROSSOVER and min(o, i) >= LEAST_SIDE


def _dense_product(left: Float[Tensor, "n o"], right: Float[Tensor, "n i"]) -> Float[Tensor, "o i"]:
    """left^T right, by oneDNN where torch has it."""
    if torch.backends.mkldnn.is_available():
        return torch.ops.mkldnn._linear_pointwise(left.T, right.T, None, "none", [], "")
    return left.T @ right


def sparse_linear(
    x: Float[Tensor, "*rows i"], weight: Float[Tensor, "o i"], bias: Float[Tensor, " o"] | None = None
) -> Float[Tensor, "*rows o"]:
    """x W^T + b without the zeros of W, for float32 on a CPU where `available()`: exact but for the order of sums.

    The gradient of the weight is dense: an entry that is zero now may enter the weight later [G A.2]. It costs less
    where the gradient that comes in is mostly zero itself, as behind an AbsTopK. Where a dense product would
    make NaN of a zero weight and an infinite activation, nothing is added. Differentiable once.
    """
    assert x.dtype == weight.dtype == torch.float32 and x.device.type == "cpu", f"{x.dtype}, {weight.dtype}, {x.device}"
    if x.numel() == 0 or weight.numel() == 0:
        return F.linear(x, weight, bias)
    out = _SparseLinear.apply(x, weight, bias, Pattern.of(weight))
    assert isinstance(out, Tensor)
    return out

"""Where the non-zeros of a weight are, worked out once for each state of the weight."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from distill.model.kernels.build import call, threads

_State = tuple[int, int, tuple[int, ...]]


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
            return cls._build(weight, _starts(weight))
        known = _look(weight)
        if known.pattern is None:
            known.pattern = cls._build(weight, known.row_start)
        return known.pattern

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
        _kept[weight] = _Known(_state(weight), row_start, found)
        return found

    @classmethod
    def _build(cls, weight: Tensor, row_start: Tensor) -> "Pattern":
        weight = weight.detach().contiguous()
        rows, columns = weight.shape
        slabs = threads(weight.numel())
        column_start = torch.empty(columns + 1, dtype=torch.int32)
        place = torch.empty(slabs, columns, dtype=torch.int32)
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


@dataclass
class _Known:
    """What has been worked out for a weight in one state."""

    state: _State
    row_start: Tensor
    pattern: Pattern | None


_kept: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def density(weight: Float[Tensor, "o i"]) -> float:
    """Share of non-zeros in [0, 1], counted again only when the weight has changed."""
    starts = _starts(weight) if weight.is_inference() else _look(weight).row_start
    return int(starts[-1]) / max(weight.numel(), 1)


def _state(weight: Tensor) -> _State:
    """What is another once the weight has changed."""
    return weight.data_ptr(), weight._version, tuple(weight.shape)


def _look(weight: Tensor) -> _Known:
    known = _kept.get(weight)
    if known is None or known.state != _state(weight):
        known = _kept[weight] = _Known(_state(weight), _starts(weight), None)
    return known


def _starts(weight: Tensor) -> Tensor:
    """Entries in the rows before each row, and in all of them."""
    rows, columns = weight.shape
    row_start = torch.empty(rows + 1, dtype=torch.int32)
    call("pattern_count", weight.detach().contiguous(), rows, columns, row_start, threads(weight.numel()))
    return row_start

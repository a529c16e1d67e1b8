"""How Adafactor walks through a flat tensor: pieces that fit a cache, and whose each part is.

A flat tensor holds slices of many parameters. Element-wise work goes over runs of it that small
parameters share; sums and step sizes belong to one parameter each. Factored second moments need to
know rows and columns too: a slice of a flattened matrix is at most three rectangles (the end of a
row, whole rows, the start of a row), so their sums need no index per element; with more than two
dimensions an element's place in the statistics is arithmetic on its place in the parameter.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from pipeline.zero_layout import Fragment

# Elements of a piece. On a CPU a few fp32 buffers of it stay near a core; elsewhere few
# launches count for more.
CPU_PIECE, DEVICE_PIECE = 1 << 17, 1 << 24


@dataclass(frozen=True)
class Piece:
    """A run of a flat tensor, and the parts of it that belong to parameters.

    Attributes:
        begin, end: its place in the flat tensor.
        parts: (which parameter of the flat tensor's, begin, end in the flat tensor).
    """

    begin: int
    end: int
    parts: tuple[tuple[int, int, int], ...]

    def of(self, flat: torch.Tensor) -> torch.Tensor:
        """Its elements of a tensor that is laid out as the flat one; a view."""
        return flat.narrow(0, self.begin, self.end - self.begin)

    def parts_of(self, piece: torch.Tensor) -> list[torch.Tensor]:
        """Its parts of `piece`, which holds its elements; views."""
        if len(self.parts) == 1 and self.parts[0][1:] == (self.begin, self.end):
            return [piece]
        return [piece.narrow(0, a - self.begin, b - a) for _, a, b in self.parts]

    def parts_of_both(
        self, one: torch.Tensor, other: torch.Tensor
    ) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """(whose, part of `one`, part of `other`) for each part, as `parts_of`."""
        owners = (index for index, _, _ in self.parts)
        yield from zip(owners, self.parts_of(one), self.parts_of(other), strict=True)


def runs(fragments: Sequence[Fragment], most: int) -> Iterator[Piece]:
    """Pieces of at most `most` elements that together hold every fragment; padding may be in them.

    `fragments` lie in the flat tensor in their order.
    """
    parts: list[tuple[int, int, int]] = []
    for index, fragment in enumerate(fragments):
        begin, end = fragment.offset, fragment.offset + fragment.length
        while begin < end:
            if parts and begin - parts[0][1] >= most:
                yield Piece(parts[0][1], parts[-1][2], tuple(parts))
                parts = []
            stop = min(end, (parts[0][1] if parts else begin) + most)
            parts.append((index, begin, stop))
            begin = stop
    if parts:
        yield Piece(parts[0][1], parts[-1][2], tuple(parts))


@dataclass(frozen=True)
class Factors:
    """Where one factored parameter's row and column statistics lie in those of its flat tensor.

    Attributes:
        shape: the whole parameter's.
        dims: the places p < q of its factored dimensions.
        row, column: where its statistics begin.
    """

    shape: torch.Size
    dims: tuple[int, int]
    row: int
    column: int

    @property
    def num_rows(self) -> int:
        """Row statistics, means over q: the parameter's elements over those of dimension q."""
        return self.shape.numel() // self.shape[self.dims[1]]

    @property
    def num_columns(self) -> int:
        """Column statistics, means over p: the parameter's elements over those of dimension p."""
        return self.shape.numel() // self.shape[self.dims[0]]

    def rows_of(self, statistics: torch.Tensor) -> torch.Tensor:
        """Its row statistics out of the flat tensor's; a view, the shape without dimension q."""
        q = self.dims[1]
        shape = self.shape[:q] + self.shape[q + 1 :]
        return statistics.narrow(0, self.row, self.num_rows).view(shape)

    def columns_of(self, statistics: torch.Tensor) -> torch.Tensor:
        """Its column statistics; a view, the shape without dimension p."""
        p = self.dims[0]
        shape = self.shape[:p] + self.shape[p + 1 :]
        return statistics.narrow(0, self.column, self.num_columns).view(shape)


@dataclass(frozen=True)
class Block(Piece):
    """A piece of one factored parameter, with its elements' places in the statistics.

    Attributes:
        factors: the parameter's.
        start: its first element's place in the flattened parameter.
        width: columns of the rectangle it is; 0 where the parameter has more than two dimensions.
    """

    factors: Factors
    start: int
    width: int

    def add_sums(self, x: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> None:
        """Add the sums of x over q to the flat tensor's `rows` and over p to its `columns`.

        x: [elements of the block].
        """
        if self.width:
            row, column = self._rectangle(rows, columns)
            shaped = x.view(-1, self.width)
            row.add_(shaped.sum(1))
            column.add_(shaped.sum(0))
        else:
            row_places, column_places = self._places(x)
            rows.index_add_(0, row_places, x.to(rows.dtype))
            columns.index_add_(0, column_places, x.to(columns.dtype))

    def scale_(self, x: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """Multiply each element of x by its row's and its column's factor, in place."""
        if self.width:
            row, column = self._rectangle(rows, columns)
            x.view(-1, self.width).mul_(row.unsqueeze(1)).mul_(column)
        else:
            row_places, column_places = self._places(x)
            x.mul_(rows[row_places]).mul_(columns[column_places])
        return x

    def _rectangle(
        self, rows: torch.Tensor, columns: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        row, column = divmod(self.start, self.factors.shape[1])
        height = (self.end - self.begin) // self.width
        return (
            rows.narrow(0, self.factors.row + row, height),
            columns.narrow(0, self.factors.column + column, self.width),
        )

    def _places(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        shape, (p, q) = self.factors.shape, self.factors.dims
        place = torch.arange(self.start, self.start + x.numel(), device=x.device)
        row = _without(place, shape, q).add_(self.factors.row)
        return row, _without(place, shape, p).add_(self.factors.column)


def blocks(index: int, fragment: Fragment, factors: Factors, most: int) -> Iterator[Block]:
    """A fragment of a factored parameter in blocks of at most `most` elements, or a row."""
    start, offset = fragment.start, fragment.offset
    end = start + fragment.length
    full = factors.shape[1]
    while start < end:
        if len(factors.shape) > 2:
            width, size = 0, min(most, end - start)
        else:
            width = size = min(full - start % full, end - start)
            if width == full:
                size *= max(1, min(most, end - start) // full)
        parts = ((index, offset, offset + size),)
        yield Block(offset, offset + size, parts, factors, start, width)
        start += size
        offset += size


def _without(place: torch.Tensor, shape: torch.Size, dim: int) -> torch.Tensor:
    """Places in a tensor of `shape` as places in the same tensor without dimension `dim`."""
    inner = math.prod(shape[dim + 1 :])
    return (place // (inner * shape[dim])) * inner + place % inner

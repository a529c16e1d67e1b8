"""One flat tensor of this rank, as Adafactor sees it: pieces to walk over, sums over the ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from pipeline.distributed import sum_over_ranks
from pipeline.optim.pieces import (
    CPU_PIECE,
    DEVICE_PIECE,
    Factors,
    Piece,
    blocks,
    runs,
)
from pipeline.optim.recipe import factored_dims
from pipeline.zero_layout import Fragment


class Shard:
    """A flat tensor, its fragments, and sums over the whole parameters they are of.

    Attributes:
        fragments: of every parameter of the flat tensor, on any rank, in order.
        factors: of each parameter, in that order; empty where they are not factored.
        pieces: what this rank holds.
        num_rows, num_columns: row and column statistics of all its parameters.
    """

    def __init__(self, fragments: Sequence[Fragment], minimum: int | None) -> None:
        """`minimum`: of a factored dimension; None where the parameters are not factored."""
        self.fragments = fragments
        self.flat = fragments[0].flat
        self.factors: list[Factors] = []
        self.num_rows = self.num_columns = 0
        self.pieces: list[Piece] = []
        most = CPU_PIECE if self.flat.device.type == "cpu" else DEVICE_PIECE
        if minimum is None:
            self.pieces += runs(fragments, most)
        else:
            self._factor(minimum, most)
        largest = max((piece.end - piece.begin for piece in self.pieces), default=0)
        self._buffer = torch.empty(largest, dtype=self.flat.dtype, device=self.flat.device)
        self._alone = fragments[0].replicated or dist.get_world_size() == 1
        owners = [index for piece in self.pieces for index, _, _ in piece.parts]
        self._owners = torch.tensor(owners, dtype=torch.int64, device=self.flat.device)
        self._numels = self.zeros(len(fragments)) + torch.tensor(
            [fragment.numel for fragment in fragments], device=self.flat.device
        )

    def _factor(self, minimum: int, most: int) -> None:
        for index, fragment in enumerate(self.fragments):
            dims = factored_dims(fragment.shape, minimum)
            assert dims is not None
            factors = Factors(fragment.shape, dims, self.num_rows, self.num_columns)
            self.factors.append(factors)
            self.pieces += blocks(index, fragment, factors, most)
            self.num_rows += factors.num_rows
            self.num_columns += factors.num_columns

    def zeros(self, *shape: int) -> torch.Tensor:
        """For sums, which are in fp64 whatever the parameters are in."""
        return torch.zeros(*shape, dtype=torch.float64, device=self.flat.device)

    def buffer(self, piece: Piece) -> torch.Tensor:
        """Room for the piece's elements; the next piece's is the same."""
        return self._buffer[: piece.end - piece.begin]

    def sum_over_ranks(self, values: torch.Tensor) -> None:
        """Sum `values` over the ranks that share the parameters, in place."""
        if not self._alone:
            sum_over_ranks(values)

    def rms(
        self, parameter: torch.Tensor, divide: Callable[[Piece], torch.Tensor]
    ) -> tuple[list[float], list[float]]:
        """RMS over each whole parameter of its update and of itself. A collective.

        Args:
            parameter: the flat tensor, [n].
            divide: piece → the update's elements of it; called once for each.
        """
        of_update: list[torch.Tensor] = []
        of_parameter: list[torch.Tensor] = []
        for piece in self.pieces:
            of_update += torch._foreach_norm(piece.parts_of(divide(piece)))
            of_parameter += torch._foreach_norm(piece.parts_of(piece.of(parameter)))
        sums = self.zeros(2, len(self.fragments))
        if self.pieces:
            norms = torch.stack(of_update + of_parameter).to(sums.dtype)
            sums.index_add_(1, self._owners, norms.square_().view(2, -1))
        self.sum_over_ranks(sums)
        rms_u, rms_p = (sums / self._numels).sqrt_().tolist()
        return rms_u, rms_p

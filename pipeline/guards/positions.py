"""Which batch of the run's order each step trains on, when policies have discarded some."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Positions:
    """Step → batch, a pure function of the batches that were discarded.

    The order's batches are numbered from 0, `global_batch` samples each. Step n, from 0, trains on
    the n-th batch that was not discarded: every batch is seen once or is discarded, none between is
    left out. Without discarded batches it is batch n.
    """

    global_batch: int
    discarded: frozenset[int] = frozenset()

    def batch(self, step: int) -> int:
        """The number of the batch that `step` trains on."""
        batch = step
        for gone in sorted(self.discarded):
            if gone > batch:
                break
            batch += 1
        return batch

    def span(self, step: int) -> tuple[int, int]:
        """The positions of the step's samples in the order: the first and one past the last."""
        start = self.batch(step) * self.global_batch
        return start, start + self.global_batch

    def without(self, batches: Iterable[int]) -> Positions:
        """These, with more batches discarded."""
        return Positions(self.global_batch, self.discarded | frozenset(batches))

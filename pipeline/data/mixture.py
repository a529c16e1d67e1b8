"""Weights to an interleaving of sources in which no prefix is a whole sample off its weights."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence

import numpy as np

PERIOD = 1 << 16


def quantise(weights: Sequence[float]) -> np.ndarray:
    """Weights (non-negative, any sum) as int64 multiples of 1/PERIOD that sum to PERIOD.

    Largest remainders are rounded up; a positive weight keeps at least 1/PERIOD.
    """
    values = np.asarray(weights, np.float64)
    if not len(values) or (values < 0).any() or not np.isfinite(values).all() or values.sum() <= 0:
        raise ValueError(f"weights={list(weights)}: give non-negative numbers, one above zero")
    exact = values / values.sum() * PERIOD
    quanta = np.where(values > 0, np.maximum(np.floor(exact), 1), 0).astype(np.int64)
    while (missing := PERIOD - int(quanta.sum())) != 0:
        step = 1 if missing > 0 else -1
        # Give to (or take from) those furthest from their share; stable, so ties go by order.
        room = (values > 0) & (quanta + step >= 1)
        gap = np.where(room, (exact - quanta) * step, -np.inf)
        chosen = np.argsort(-gap, kind="stable")[: min(abs(missing), int(room.sum()))]
        quanta[chosen] += step
    return quanta


def quota_sequence(quanta: np.ndarray) -> np.ndarray:
    """One period of sources, uint16 [PERIOD]: each prefix holds floor or ceil of every quota.

    The j-th sample of source s (from 0) may not come before slot floor(j·P/q_s) nor after slot
    ceil((j+1)·P/q_s) − 1. Scheduling by earliest deadline meets every such window (Steiner and
    Yeomans, "Level Schedules for Mixed-Model, Just-in-Time Processes", 1993).
    """
    source = np.repeat(np.arange(len(quanta)), quanta)
    number = np.concatenate([np.arange(count) for count in quanta])
    release = number * PERIOD // quanta[source]
    deadline = -(-(number + 1) * PERIOD // quanta[source])
    by_release = np.argsort(release, kind="stable")
    # One integer orders the queue: the deadline first, then the source.
    urgency = (deadline * len(quanta) + source)[by_release].tolist()
    released = np.searchsorted(release[by_release], np.arange(PERIOD), side="right").tolist()
    sequence: list[int] = []
    queue: list[int] = []
    taken = 0
    for slot in range(PERIOD):
        while taken < released[slot]:
            heapq.heappush(queue, urgency[taken])
            taken += 1
        sequence.append(heapq.heappop(queue))
    return (np.array(sequence) % len(quanta)).astype(np.uint16)


class Mixture:
    """Position in training → (source, how many samples of that source came before).

    Args:
        weights: source name to weight, any sum; a source with weight 0 never comes.

    Attributes:
        sources: the names, sorted; results refer to them by index.
        quanta: weights in units of 1/PERIOD, int64 [sources].
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        self.sources = tuple(sorted(weights))
        self.quanta = quantise([weights[name] for name in self.sources])
        self._sequence = quota_sequence(self.quanta)
        # Samples of its own source that came earlier in the period, at each slot.
        self._earlier = np.empty(PERIOD, np.int64)
        for index, count in enumerate(self.quanta):
            self._earlier[self._sequence == index] = np.arange(count)

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Source index and number within that source's endless stream, int64, as `positions`."""
        periods, slots = np.divmod(np.asarray(positions, np.int64), PERIOD)
        source = self._sequence[slots].astype(np.int64)
        return source, periods * self.quanta[source] + self._earlier[slots]

    def counts(self, position: int) -> dict[str, int]:
        """How many samples of each source the first `position` samples hold."""
        periods, slots = divmod(position, PERIOD)
        partial = np.bincount(self._sequence[:slots], minlength=len(self.sources))
        totals = periods * self.quanta + partial
        return {name: int(total) for name, total in zip(self.sources, totals, strict=True)}

"""Weights to an interleaving of sources in which no prefix is a whole sample off its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from heapq import heappop, heappush, heappushpop

import numpy as np

from pipeline.data.natural import NaturalMixture

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


@lru_cache(maxsize=16)
def _quota_sequence(quanta: tuple[int, ...]) -> np.ndarray:
    return quota_sequence(np.array(quanta, np.int64))


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
    # One integer orders the queue: the deadline first, then the source.
    urgency = deadline * len(quanta) + source
    coming = iter(urgency[np.argsort(release, kind="stable")].tolist())
    sequence: list[int] = []
    queue: list[int] = []
    for released in np.bincount(release, minlength=PERIOD).tolist():
        if not released:
            sequence.append(heappop(queue))
            continue
        while released > 1:
            heappush(queue, next(coming))
            released -= 1
        # Mostly one comes and one goes, which is one operation on the queue.
        sequence.append(heappushpop(queue, next(coming)))
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
        self._sequence = _quota_sequence(tuple(self.quanta.tolist()))
        # Samples of its own source that came earlier in the period, at each slot.
        self._earlier = np.empty(PERIOD, np.int64)
        self._slots: list[np.ndarray] = []
        for index, count in enumerate(self.quanta):
            self._slots.append(np.flatnonzero(self._sequence == index))
            self._earlier[self._slots[-1]] = np.arange(count)

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Source index and number within that source's endless stream, int64, as `positions`."""
        periods, slots = np.divmod(np.asarray(positions, np.int64), PERIOD)
        source = self._sequence[slots].astype(np.int64)
        return source, periods * self.quanta[source] + self._earlier[slots]

    def counts(self, position: int) -> dict[str, int]:
        """How many samples of each source the first `position` samples hold."""
        periods, slots = divmod(position, PERIOD)
        return {
            name: int(periods * quantum + np.searchsorted(mine, slots))
            for name, quantum, mine in zip(self.sources, self.quanta, self._slots, strict=True)
        }


class StagedMixture:
    """Weights that change at given positions; each source's stream goes on where it was.

    Args:
        stages: position to the weights that hold from there on; one begins at 0. None: natural
            proportions.
        natural: source to its number of samples; needed where a stage is None.

    Attributes:
        sources: every name in any stage, sorted; results refer to them by index.
    """

    def __init__(
        self,
        stages: Mapping[int, Mapping[str, float] | None],
        natural: Mapping[str, int] | None = None,
    ) -> None:
        self._begins = np.array(sorted(stages), np.int64)
        if not len(self._begins) or self._begins[0] != 0:
            raise ValueError("weights: the first stage begins at sample 0")
        described = [(stages[begin], natural or {}) for begin in self._begins.tolist()]
        named = [counts if weights is None else weights for weights, counts in described]
        self.sources = tuple(sorted({name for names in named for name in names}))
        self._mixtures: list[Mixture | NaturalMixture] = [
            NaturalMixture({name: counts.get(name, 0) for name in self.sources})
            if weights is None
            else Mixture({name: weights.get(name, 0.0) for name in self.sources})
            for weights, counts in described
        ]
        # Samples of each source before each stage, [stages, sources].
        before = [dict.fromkeys(self.sources, 0)]
        for number in range(1, len(self._begins)):
            inside = self._mixtures[number - 1].counts(
                int(self._begins[number] - self._begins[number - 1])
            )
            before.append({name: before[-1][name] + inside[name] for name in self.sources})
        self._base = np.array([[row[name] for name in self.sources] for row in before], np.int64)

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Source index and number within that source's endless stream, int64, as `positions`."""
        positions = np.asarray(positions, np.int64)
        if len(self._mixtures) == 1:
            return self._mixtures[0].locate(positions)
        stage = np.searchsorted(self._begins, positions, side="right") - 1
        source, number = np.empty_like(positions), np.empty_like(positions)
        for index in sorted(set(stage.tolist())):
            chosen = stage == index
            mine, count = self._mixtures[index].locate(positions[chosen] - self._begins[index])
            source[chosen], number[chosen] = mine, count + self._base[index, mine]
        return source, number

    def counts(self, position: int) -> dict[str, int]:
        """How many samples of each source the first `position` samples hold."""
        stage = int(np.searchsorted(self._begins, position, side="right")) - 1
        inside = self._mixtures[stage].counts(position - int(self._begins[stage]))
        base = self._base[stage].tolist()
        return {name: base[i] + inside[name] for i, name in enumerate(self.sources)}

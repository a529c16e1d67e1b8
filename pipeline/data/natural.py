"""Natural proportions, exactly: one pass over a corpus sees every sample of every source once.

Two sources take turns so that the first m samples hold round(m·a / (a + b)) of the one with a
samples, which is whole-number arithmetic at any position and leaves nothing to store. More sources
are a tree of such pairs, in which the two smallest are joined first (Huffman, "A Method for the
Construction of Minimum-Redundancy Codes", 1952).

A pair's split is at most ½ off, and a part inherits its share r of what the pair is off. In
Huffman's tree no part weighs more than its pair's neighbour, so r of two levels together is at most
½: errors e ≤ ½ + r·(½ + r'·e'') < 1 + ½·e'' stay below 2 samples, however many sources there are.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

_WORD = 61  # bits of an int64 that sums of two products may fill


@dataclass(frozen=True)
class _Pair:
    """Two streams in turns: each is a source's index or again a pair.

    Attributes:
        first, second: the streams.
        share: samples of `first` a pass.
        total: samples of both a pass.
    """

    first: _Pair | int
    second: _Pair | int
    share: int
    total: int

    def before(self, position: int) -> int:
        """How many of the first `position` samples are of `first`."""
        return (position * self.share + self.total // 2) // self.total

    def split(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of each position: `before`, int64, and whether the sample there is of `first`, bool.

        The product of two int64 is divided as on paper, in digits of as many bits as there is room.
        """
        passes, inside = np.divmod(positions, self.total)
        digit = _WORD - self.total.bit_length()
        digits = -(-self.total.bit_length() // digit)
        quotient = rest = np.zeros_like(inside)
        for place in reversed(range(digits)):
            low = (inside >> (place * digit)) & ((1 << digit) - 1)
            rounding = 0 if place else self.total // 2
            more, rest = np.divmod((rest << digit) + low * self.share + rounding, self.total)
            quotient = (quotient << digit) + more
        return passes * self.share + quotient, rest >= self.total - self.share


class NaturalMixture:
    """Position in training → (source, how many samples of that source came before).

    After every pass of as many samples as there are, each source was seen exactly once more; no
    prefix is two samples off its proportions.

    Args:
        samples: source name to its number of samples; a source without any never comes.

    Attributes:
        sources: the names, sorted; results refer to them by index.
    """

    def __init__(self, samples: Mapping[str, int]) -> None:
        self.sources = tuple(sorted(samples))
        counts = [samples[name] for name in self.sources]
        if min(counts, default=0) < 0 or not 1 <= sum(counts) < 1 << _WORD - 1:
            raise ValueError(
                f"samples={dict(samples)}: give whole numbers, one above zero, of a sum below 2^60"
            )
        # An entry's number settles ties, so that the tree depends on the counts alone.
        queue: list[tuple[int, int, _Pair | int]] = [
            (count, index, index) for index, count in enumerate(counts) if count
        ]
        heapq.heapify(queue)
        for number in range(len(counts), len(counts) + len(queue) - 1):
            second, first = heapq.heappop(queue), heapq.heappop(queue)
            total = first[0] + second[0]
            heapq.heappush(queue, (total, number, _Pair(first[2], second[2], first[0], total)))
        self._root = queue[0][2]

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Source index and number within that source's endless stream, int64, as `positions`."""
        asked = np.asarray(positions, np.int64)
        source, number = np.empty(asked.size, np.int64), np.empty(asked.size, np.int64)
        streams = [(self._root, np.arange(asked.size), asked.reshape(-1))]
        while streams:
            stream, places, inside = streams.pop()
            if isinstance(stream, int):
                source[places], number[places] = stream, inside
            elif len(places):
                before, is_first = stream.split(inside)
                others = ~is_first
                streams.append((stream.first, places[is_first], before[is_first]))
                streams.append((stream.second, places[others], (inside - before)[others]))
        return source.reshape(asked.shape), number.reshape(asked.shape)

    def counts(self, position: int) -> dict[str, int]:
        """How many samples of each source the first `position` samples hold."""
        found = dict.fromkeys(self.sources, 0)
        streams = [(self._root, position)]
        while streams:
            stream, inside = streams.pop()
            if isinstance(stream, int):
                found[self.sources[stream]] = inside
            else:
                before = stream.before(inside)
                streams += [(stream.first, before), (stream.second, inside - before)]
        return found

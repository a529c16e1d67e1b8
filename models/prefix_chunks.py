"""How ENTP cuts a batch into chunks of prefixes, from shapes alone. Imports no torch."""

from __future__ import annotations

import itertools
from dataclasses import dataclass


@dataclass(frozen=True)
class Chunk:
    """Rows `first_row` … `last_row` − 1 of a batch, prefixes ending at `start` … `stop` − 1."""

    first_row: int
    last_row: int
    start: int
    stop: int


def plan_chunks(batch_size: int, seq_len: int, max_pairs: int) -> list[Chunk]:
    """Chunks of at most `max_pairs` (token, prefix) pairs that cover a batch.

    Whole rows where a row fits, as many in each chunk as divides them evenly; else the prefixes of
    one row, which repeats the first layer's projections. A single prefix is never divided.
    """
    pairs = seq_len * (seq_len + 1) // 2
    if pairs <= max_pairs:
        count = -(-batch_size // (max_pairs // pairs))
        edges = [batch_size * i // count for i in range(count + 1)]
        return [Chunk(low, high, 0, seq_len) for low, high in itertools.pairwise(edges)]
    edges, filled = [0], 0
    even = pairs / -(-pairs // max_pairs)
    for t in range(seq_len):
        # Close a chunk where the even share is nearest, and never above the bound.
        if filled and (filled + (t + 1) / 2 > even or filled + t + 1 > max_pairs):
            edges.append(t)
            filled = 0
        filled += t + 1
    edges.append(seq_len)
    return [
        Chunk(row, row + 1, start, stop)
        for row in range(batch_size)
        for start, stop in itertools.pairwise(edges)
    ]

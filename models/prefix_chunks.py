"""Which prefixes of a batch ENTP computes together, from shapes alone. Imports no torch."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

# The fewest prefixes of full length that a chunk of several rows has room for.
_PREFIXES = 3


@dataclass(frozen=True)
class Chunk:
    """Rows `first_row` … `last_row` − 1 of a batch, their prefixes numbered `start` … `stop` − 1.

    Prefix number n ends at token n, or is the n-th that was drawn.
    """

    first_row: int
    last_row: int
    start: int
    stop: int


def plan_chunks(batch_size: int, seq_len: int, max_pairs: int, sampled: int = 0) -> list[Chunk]:
    """Chunks of at most `max_pairs` (token, prefix) pairs that cover a batch.

    Whole rows where a row fits, as many in each chunk as divides them evenly; else some prefixes of
    as many rows as leave room for three of the longest: what is done for a prefix is done for all
    rows at once. A single prefix of a row is never divided.

    Args:
        sampled: prefixes drawn for each row; all of them when 0 or not fewer. Where they will end
            is not known, so each counts with `seq_len` pairs: every rank has as many chunks.
    """
    is_sample = 0 < sampled < seq_len
    lengths = [seq_len] * sampled if is_sample else list(range(1, seq_len + 1))
    pairs = sum(lengths)
    groups = -(-batch_size // max(1, max_pairs // min(pairs, _PREFIXES * seq_len)))
    rows = [batch_size * i // groups for i in range(groups + 1)]
    parts = _cut(lengths, max_pairs // -(-batch_size // groups))
    return [
        Chunk(low, high, start, stop)
        for low, high in itertools.pairwise(rows)
        for start, stop in itertools.pairwise(parts)
    ]


def _cut(lengths: Sequence[int], max_pairs: int) -> list[int]:
    """Where prefixes of `lengths` are cut into parts of at most `max_pairs` pairs."""
    pairs = sum(lengths)
    edges, filled = [0], 0
    even = pairs / -(-pairs // max_pairs)
    for number, length in enumerate(lengths):
        # Close a chunk where the even share is nearest, and never above the bound.
        if filled and (filled + length / 2 > even or filled + length > max_pairs):
            edges.append(number)
            filled = 0
        filled += length
    return [*edges, len(lengths)]


def by_rows(chunks: Sequence[Chunk]) -> Iterator[tuple[slice, list[Chunk]]]:
    """The chunks of each group of rows."""
    for rows, group in itertools.groupby(chunks, lambda c: (c.first_row, c.last_row)):
        yield slice(*rows), list(group)


def spread(low: int, high: int, count: int, offset: float) -> list[int]:
    """`count` of the positions `low` … `high` − 1, evenly spread; all of them where they are fewer.

    With `offset` uniform in [0, 1) each position is chosen with probability count / (high − low),
    exactly: the i-th is where (i + offset)·(high − low) / count falls.
    """
    size = high - low
    if size <= count:
        return list(range(low, high))
    return [low + min(int((i + offset) * size / count), size - 1) for i in range(count)]

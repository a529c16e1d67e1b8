"""Sequences of any length from a shard folder, and the order in which training sees them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.data.manifest import Shard, read_manifest
from pipeline.data.mixture import Mixture
from pipeline.data.order import Permutation, ShuffleWindow, WindowedOrder, derive_key
from pipeline.data.shards import ShardReader, token_layout
from pipeline.options import UserError

_OPEN_SHARDS = 1024  # maps held at once; the kernel allows 65,530 a process
_LOCATED_AT_ONCE = 1024  # positions whose order is computed together, which vectorises
_EVALUATION_KEY = 0x15F10B  # fixed, so that every run ever made is scored on the same choice


class _Source:
    """The shards of one source, as one run of sequences."""

    def __init__(self, shards: tuple[Shard, ...], block_tokens: int, seq_len: int) -> None:
        self.shards = shards
        # Only the last block is padded; sequences of nothing but padding are not counted.
        self.shard_sequences = [-(-shard.tokens // seq_len) for shard in shards]
        self.ends = np.cumsum(self.shard_sequences)
        self.num_sequences = int(self.ends[-1])
        self.last_valid = shards[-1].tokens - (self.shard_sequences[-1] - 1) * seq_len


class SequenceStore:
    """Sequence `index` of a source, for any `seq_len` that divides the block.

    Args:
        folder: a shard folder, finished.
        split: "train" or "validation".
        seq_len: tokens a sequence.

    Attributes:
        manifest: of the folder.
        sources: names, sorted.
        num_sequences: source to number of sequences; the last may be padded.
        total: number of sequences of all sources.

    Raises:
        UserError: no manifest, no such split, or a seq_len that does not divide the block.
    """

    def __init__(self, folder: str | Path, split: str, seq_len: int) -> None:
        self.folder = Path(folder)
        self.split = split
        self.seq_len = seq_len
        self.manifest = read_manifest(folder)
        block = self.manifest.block_tokens
        if self.manifest.kind != "tokens":
            raise UserError(
                f"data={str(folder)!r}: holds {self.manifest.kind} rows, not tokens; give the "
                "--output of isoflop tokenize"
            )
        if seq_len < 1 or block % seq_len:
            raise UserError(
                f"seq_len={seq_len}: does not divide the {block} tokens of a block; the nearest "
                f"that do are {_nearest_divisors(block, seq_len)}"
            )
        if split not in self.manifest.splits():
            raise UserError(
                f"split={split!r}: {folder} holds only {', '.join(self.manifest.splits())}; "
                "give one of them, or tokenise with another --validation_fraction"
            )
        self._layout = token_layout(block, self.manifest.dtype)
        self._sources = {
            name: _Source(self.manifest.select(split, name), block, seq_len)
            for name in self.manifest.sources(split)
        }
        self.sources = tuple(self._sources)
        self.num_sequences = {name: s.num_sequences for name, s in self._sources.items()}
        self.total = sum(self.num_sequences.values())
        counts = [self.num_sequences[name] for name in self.sources]
        self._first_number = dict(zip(self.sources, np.cumsum([0, *counts]).tolist(), strict=False))
        self._readers: OrderedDict[str, ShardReader] = OrderedDict()

    def shard_sequences(self, source: str) -> list[int]:
        """Number of sequences in each shard of a source, in task order."""
        return self._sources[source].shard_sequences

    def sample_number(self, source: str, index: int) -> int:
        """The number, unique over all sources of the split, of a source's sequence `index`."""
        return self._first_number[source] + index

    def read(self, source: str, index: int) -> tuple[np.ndarray, int]:
        """Ids [seq_len] (uint16 or uint32, read-only) and how many of them are no padding.

        Raises:
            IndexError: no such sequence.
            CorruptShardError: what is stored is not what was written.
        """
        entry = self._sources[source]
        if not 0 <= index < entry.num_sequences:
            raise IndexError(f"{source} has {entry.num_sequences} sequences, not number {index}")
        number = int(np.searchsorted(entry.ends, index, side="right"))
        inside = index - (int(entry.ends[number - 1]) if number else 0)
        sample, start = divmod(inside * self.seq_len, self.manifest.block_tokens)
        ids = self._reader(entry.shards[number]).read(sample, "tokens.npy", start, self.seq_len)
        return ids, entry.last_valid if index == entry.num_sequences - 1 else self.seq_len

    def _reader(self, shard: Shard) -> ShardReader:
        reader = self._readers.get(shard.path)
        if reader is None:
            reader = ShardReader(self.folder / shard.path, self._layout, shard.samples)
            self._readers[shard.path] = reader
            if len(self._readers) > _OPEN_SHARDS:
                self._readers.popitem(last=False)
        else:
            self._readers.move_to_end(shard.path)
        return reader

    def evaluation_choice(self, count: int) -> list[tuple[str, int]]:
        """`count` (source, index) pairs, at natural proportions, the same for every seed.

        All of them, when the split has no more. Sources share by largest remainder, and the last,
        padded sequence of each comes only when all are taken.
        """
        count = min(count, self.total)
        exact = {name: count * n / self.total for name, n in self.num_sequences.items()}
        quota = {name: int(share) for name, share in exact.items()}
        by_remainder = sorted(self.sources, key=lambda name: quota[name] - exact[name])
        for name in by_remainder[: count - sum(quota.values())]:
            quota[name] += 1
        chosen: list[tuple[str, int]] = []
        for name in self.sources:
            whole = self.num_sequences[name] - 1
            take = min(quota[name], whole)
            key = derive_key(_EVALUATION_KEY, *name.encode())
            indices = Permutation(whole, key)(np.arange(take)).tolist() if take else []
            indices += [whole] if quota[name] > whole else []
            chosen += [(name, int(index)) for index in sorted(indices)]
        return chosen


def _nearest_divisors(block: int, seq_len: int) -> str:
    divisors = {d for i in range(1, int(block**0.5) + 1) if block % i == 0 for d in (i, block // i)}
    below = [d for d in divisors if d < seq_len]
    above = [d for d in divisors if d > seq_len]
    return " and ".join(str(d) for d in ([max(below)] if below else []) + [*sorted(above)[:1]])


@dataclass(frozen=True)
class SampleBatch:
    """Consecutive samples of the training order.

    Attributes:
        sample_numbers: which sequences, int64 [count]; `SequenceStore.sample_number`.
        ids: [count, seq_len], uint16 or uint32.
        valid: ids that are no padding, int64 [count].
    """

    sample_numbers: np.ndarray
    ids: np.ndarray
    valid: np.ndarray


class TrainingOrder:
    """Position → sample, stateless: the same for every rank count, worker count and restart.

    Args:
        store: the sequences.
        seed: keys the order.
        shuffle_window: shards a window, or "all" for a uniform order over each epoch.
        weights: source to weight; by default each source's own number of sequences.

    Raises:
        UserError: weights for a source that is not there, none above zero, or a bad window.
    """

    def __init__(
        self,
        store: SequenceStore,
        seed: int,
        shuffle_window: ShuffleWindow = "all",
        weights: Mapping[str, float] | None = None,
    ) -> None:
        self.store = store
        chosen: Mapping[str, float] = store.num_sequences if weights is None else weights
        unknown = sorted(set(chosen) - set(store.sources))
        if unknown:
            raise UserError(
                f"weights={unknown[0]!r}: no such source in {store.folder}; it has "
                f"{', '.join(store.sources)}"
            )
        try:
            self.mixture = Mixture(chosen)
            self._orders = [
                WindowedOrder(
                    store.shard_sequences(name), derive_key(seed, *name.encode()), shuffle_window
                )
                for name in self.mixture.sources
            ]
        except ValueError as error:
            raise UserError(str(error)) from None
        self._sizes = np.array([len(order) for order in self._orders], np.int64)
        self._located: tuple[int, np.ndarray, np.ndarray] = (-1, self._sizes[:0], self._sizes[:0])

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Source index (into `mixture.sources`), epoch of that source, sequence index: int64."""
        source, number = self.mixture.locate(positions)
        epoch, inside = np.divmod(number, self._sizes[source])
        index = np.empty_like(inside)
        for s in np.unique(source):
            for e in np.unique(epoch[source == s]):
                chosen = (source == s) & (epoch == e)
                index[chosen] = self._orders[s].locate(int(e), inside[chosen])
        return source, epoch, index

    def epochs(self, position: int) -> dict[str, float]:
        """How often each source has been gone through when `position` samples were seen."""
        counts = self.mixture.counts(position)
        return {name: counts[name] / self.store.num_sequences[name] for name in counts}

    def sample(self, position: int) -> tuple[int, np.ndarray, int]:
        """Sample number, ids [seq_len] and valid length at one position."""
        batch = self.batch(position, 1)
        return int(batch.sample_numbers[0]), batch.ids[0], int(batch.valid[0])

    def batch(self, start: int, count: int) -> SampleBatch:
        """Samples at positions [start, start + count)."""
        numbers = np.empty(count, np.int64)
        ids = np.empty((count, self.store.seq_len), self.store.manifest.dtype)
        valid = np.empty(count, np.int64)
        for row in range(count):
            name, index = self._at(start + row)
            ids[row], valid[row] = self.store.read(name, index)
            numbers[row] = self.store.sample_number(name, index)
        return SampleBatch(numbers, ids, valid)

    def _at(self, position: int) -> tuple[str, int]:
        """Source and sequence at a position, from a run of positions that is worked out at once."""
        run, offset = divmod(position, _LOCATED_AT_ONCE)
        if self._located[0] != run:
            positions = np.arange(run * _LOCATED_AT_ONCE, (run + 1) * _LOCATED_AT_ONCE)
            source, _, index = self.locate(positions)
            self._located = (run, source, index)
        return self.mixture.sources[self._located[1][offset]], int(self._located[2][offset])

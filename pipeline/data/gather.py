"""Many sequences at once out of the shards of a split: worked out in bulk, verified one by one."""

from __future__ import annotations

import resource
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import xxhash

from pipeline.data.manifest import Shard
from pipeline.data.shards import CHUNK_BYTES, SampleLayout, ShardReader

_MOST_OPEN = 32_768  # maps held at once; the kernel allows 65,530 a process
_SPARE_FILES = 256  # descriptors left to the rest of the process


class ShardTable:
    """The sequences of several shards, numbered through from 0 in the order of the shards.

    Args:
        shards: of one split.
        layout: of token shards.
        seq_len: ids in a sequence; it divides a block.
        file_of: where a shard's file lies, called when it is opened.
        most_open: shards open at once; by default what the process may open.

    Attributes:
        shard_sequences: sequences in each shard, int64 [shards].
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        layout: SampleLayout,
        seq_len: int,
        file_of: Callable[[Shard], Path],
        most_open: int | None = None,
        is_here: Callable[[Shard], bool] = lambda shard: True,
    ) -> None:
        self._shards, self._layout, self._file_of = shards, layout, file_of
        self._is_here = is_here
        self.seq_len = seq_len
        member = layout.members[0]
        self._block = member.shape[0]
        self._item = np.dtype(member.dtype).itemsize
        self._dtype = np.dtype(member.dtype)
        self._sequence_bytes = seq_len * self._item
        # Only the last block of a source is padded; sequences of padding alone do not count.
        tokens = np.array([shard.tokens for shard in shards], np.int64)
        self.shard_sequences = -(-tokens // seq_len)
        self._ends = np.cumsum(self.shard_sequences)
        self._starts = self._ends - self.shard_sequences
        self._readers: list[ShardReader | None] = [None] * len(shards)
        self._opened: deque[int] = deque()
        self._asked: set[tuple[int, int, int]] = set()
        self._most_open = most_open or _files_allowed(len(shards))

    def locate(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Shard, its sample, and the first id in that sample of each sequence, as `numbers`."""
        shard = np.searchsorted(self._ends, numbers, side="right")
        sample, start = np.divmod((numbers - self._starts[shard]) * self.seq_len, self._block)
        return shard, sample, start

    def reader(self, shard: int) -> ShardReader:
        """The reader of one shard, opened where it is not. Raises CorruptShardError."""
        return self._readers[shard] or self._open(shard)

    def plan(self, numbers: np.ndarray) -> np.ndarray:
        """What has to be read for sequences `numbers` (int64 [n]): int64 [n, 5].

        Columns: shard; the bytes of the file from and to which whole 4 KiB blocks are touched (the
        last block of a member may be shorter); index of the first one's checksum among the file's
        8-byte words; byte of the first id.
        """
        shard, sample, start = self.locate(numbers)
        layout, member = self._layout, self._layout.members[0]
        sample_at = sample * layout.sample_bytes
        data = sample_at + layout.data_offset[member.name]
        begin, end = start * self._item, (start + self.seq_len) * self._item
        first = begin // CHUNK_BYTES
        stop = np.minimum(-(-end // CHUNK_BYTES) * CHUNK_BYTES, member.data_bytes)
        sums = (sample_at + layout.data_offset[layout.members[-1].name]) // 8
        columns = (shard, data + first * CHUNK_BYTES, data + stop, sums + first, data + begin)
        return np.stack(columns, axis=1)

    def read(self, plan: np.ndarray) -> np.ndarray:
        """The planned sequences, [n, seq_len], every 4 KiB touched checked.

        Raises:
            CorruptShardError: naming shard, key and byte.
        """
        digest, readers, length = xxhash.xxh3_64_intdigest, self._readers, self._sequence_bytes
        found = []
        for shard, low, stop, sum_at, begin in plan.tolist():
            reader = readers[shard] or self._open(shard)
            view = reader.view
            touched = view[low:stop]
            if stop - low > CHUNK_BYTES:
                self._check(reader, low, stop, sum_at)
            elif digest(touched) != reader.words64[sum_at]:
                raise reader.corrupt(low)
            found.append(touched if stop - low == length else view[begin : begin + length])
        # One copy for all, and one that may be written to.
        return np.frombuffer(bytearray().join(found), self._dtype).reshape(-1, self.seq_len)

    @staticmethod
    def _check(reader: ShardReader, low: int, stop: int, sum_at: int) -> None:
        for number, at in enumerate(range(low, stop, CHUNK_BYTES), sum_at):
            chunk = reader.view[at : min(at + CHUNK_BYTES, stop)]
            if xxhash.xxh3_64_intdigest(chunk) != reader.words64[number]:
                raise reader.corrupt(at)

    def will_need(self, plan: np.ndarray, piece: int = 1) -> None:
        """Ask the kernel to bring what is planned into memory, without waiting for it.

        What lies behind a URL and is not here is left alone: fetching it would be waiting.

        Args:
            piece: bytes, a multiple of a page; where given, whole such pieces of the files are
                asked for, each once until `forget_asked`: a request costs the kernel about as much
                for sixteen pages as for one. Good where all of them can stay until they are read.
        """
        asked = self._asked
        for shard, low, end, sum_at, _ in plan.tolist():
            sums = -(-(end - low) // CHUNK_BYTES)
            for begin, stop in ((low, end), (sum_at * 8, (sum_at + sums) * 8)):
                if piece > 1:
                    begin, stop = begin // piece * piece, -(-stop // piece) * piece
                    if (shard, begin, stop) in asked:
                        continue
                reader = self._readers[shard]
                if reader is None:
                    if not self._is_here(self._shards[shard]):
                        break
                    reader = self._open(shard)
                reader.will_need(begin, stop)
                if piece > 1:
                    asked.add((shard, begin, stop))

    def forget_asked(self) -> None:
        """Ask for pieces again: they may have had to make room."""
        self._asked.clear()

    def _open(self, shard: int) -> ShardReader:
        described = self._shards[shard]
        reader = ShardReader(
            self._file_of(described), self._layout, described.samples, described.path
        )
        self._readers[shard] = reader
        self._opened.append(shard)
        if len(self._opened) > self._most_open:
            # The map goes when the last view of it does.
            self._readers[self._opened.popleft()] = None
        return reader


def _files_allowed(wanted: int) -> int:
    """How many maps may be held: each keeps a descriptor, and the soft limit is often 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = min(wanted, _MOST_OPEN) + _SPARE_FILES
    if soft != resource.RLIM_INFINITY and soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft == resource.RLIM_INFINITY:
        return _MOST_OPEN
    return max(1, min(soft - _SPARE_FILES, _MOST_OPEN))

"""Documents to blocks to shards, and the tail that fills no block."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from pipeline.data.manifest import Shard
from pipeline.data.shards import SampleLayout, ShardWriter


class BlockPacker:
    """Joins the documents of one split and source into blocks, and blocks into shards.

    `names` are from `shard_names`; the packers of a task share them.
    """

    def __init__(
        self,
        output: Path,
        split: str,
        source: str,
        names: Iterator[str],
        layout: SampleLayout,
        limit: int,
    ) -> None:
        member = layout.members[0]
        self.shards: list[Shard] = []
        self._output, self._split, self._source, self._names = output, split, source, names
        self._layout = layout
        self._samples_limit = max(1, limit // layout.sample_bytes)
        self._block = np.empty(member.shape, member.dtype)
        self._filled = 0
        self._ends: list[tuple[int, int]] = []  # of documents in this block: end, text bytes
        self._writer: ShardWriter | None = None
        self._tokens = self._documents = self._text_bytes = 0

    def add(self, ids: np.ndarray) -> None:
        """Append ids of the document that is open."""
        while len(ids):
            if self._filled == len(self._block):
                self._write_block()
            count = min(len(self._block) - self._filled, len(ids))
            self._block[self._filled : self._filled + count] = ids[:count]
            self._filled += count
            ids = ids[count:]

    def end_document(self, text_bytes: int) -> None:
        """What was added since the last end, [EOD] included, is a document of so many bytes."""
        self._ends.append((self._filled, text_bytes))

    def _write_block(self) -> None:
        if self._writer is None:
            path = self._output / self._split / self._source / next(self._names)
            self._writer = ShardWriter(path, self._layout)
        self._writer.add({self._layout.members[0].name: self._block})
        self._tokens += self._filled
        self._documents += len(self._ends)
        self._text_bytes += sum(text_bytes for _, text_bytes in self._ends)
        self._filled = 0
        self._ends.clear()
        if self._writer.samples == self._samples_limit:
            self._close_shard()

    def _close_shard(self) -> None:
        if self._writer is None:
            return
        written = self._writer.close()
        self.shards.append(
            Shard(
                path=self._writer.path.relative_to(self._output).as_posix(),
                split=self._split,
                source=self._source,
                samples=written.samples,
                tokens=self._tokens,
                documents=self._documents,
                text_bytes=self._text_bytes,
                bytes=written.bytes,
                sha256=written.sha256,
            )
        )
        self._writer = None
        self._tokens = self._documents = self._text_bytes = 0

    def tail(self) -> dict[str, np.ndarray]:
        """End the shards; what filled no block: ids, ends of documents in them, text bytes."""
        if self._filled == len(self._block):
            self._write_block()
        self._close_shard()
        ends = np.array(self._ends, np.int64).reshape(-1, 2)
        return {
            "ids": self._block[: self._filled].copy(),
            "ends": ends[:, 0],
            "text_bytes": ends[:, 1],
        }

    def pad(self, pad: int) -> None:
        """End the shards, the last block padded."""
        if self._filled:
            self._block[self._filled :] = pad
            self._write_block()
        self._close_shard()

    def abort(self) -> None:
        """Remove the shard that was being written."""
        if self._writer is not None:
            self._writer.abort()

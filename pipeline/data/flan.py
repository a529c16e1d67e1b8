"""Instruction rows from a FLAN folder: inputs, targets, and the name of their task.

The folder is laid out like a shard folder, with the splits train and heldout and these members in
a sample: `inputs.npy` [block_tokens] and `targets.npy` [block_tokens / 4], ids of whole rows one
after another; `offsets.npy` [rows + 1, 2], where each row begins in both (a repeated last pair
means no more rows); `tasks.npy` [rows], names as UTF-8 bytes; and the checksums over all of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from pipeline.data.manifest import Shard, read_manifest
from pipeline.data.order import Permutation
from pipeline.data.remote import cache_of
from pipeline.data.shards import Member, SampleLayout, ShardReader, ShardWriter
from pipeline.options import UserError

TASK_NAME_BYTES = 96
_TARGETS_SHARE = 4
_TOKENS_PER_ROW = 128
_EVALUATION_KEY = 0xF1A


def flan_layout(block_tokens: int, dtype: str) -> SampleLayout:
    """The layout of FLAN shards."""
    rows = max(1, block_tokens // _TOKENS_PER_ROW)
    return SampleLayout(
        [
            Member("inputs.npy", dtype, (block_tokens,)),
            Member("targets.npy", dtype, (block_tokens // _TARGETS_SHARE,)),
            Member("offsets.npy", "int32", (rows + 1, 2)),
            Member("tasks.npy", f"S{TASK_NAME_BYTES}", (rows,)),
        ]
    )


class FlanWriter:
    """Packs the rows of one split and source into samples; no row straddles two.

    Args:
        folder: of the manifest.
        names: from `shard_names`, shared by all splits and sources.
        layout: from `flan_layout`.
        pad: id that fills what rows leave free.
        shard_bytes: size at which a shard is full.
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        source: str,
        names: Iterator[str],
        layout: SampleLayout,
        *,
        pad: int,
        shard_bytes: int,
    ) -> None:
        self._folder, self._split, self._source, self._names = folder, split, source, names
        self._layout, self._pad = layout, pad
        self._limit = max(1, shard_bytes // layout.sample_bytes)
        self._room = {name: member.shape[0] for name, member in layout.by_name.items()}
        self._rows: list[tuple[np.ndarray, np.ndarray, bytes]] = []
        self._filled = [0, 0]
        self._shards: list[Shard] = []
        self._writer: ShardWriter | None = None
        self._tokens = self._documents = self._text_bytes = 0

    def add(self, inputs: np.ndarray, targets: np.ndarray, task: bytes, text_bytes: int) -> None:
        """Append one row: ids, the task's name in UTF-8, and the UTF-8 bytes of its targets."""
        if (
            len(self._rows) == self._room["tasks.npy"]
            or self._filled[0] + len(inputs) > self._room["inputs.npy"]
            or self._filled[1] + len(targets) > self._room["targets.npy"]
        ):
            self._write_sample()
        self._rows.append((inputs, targets, task))
        self._filled = [self._filled[0] + len(inputs), self._filled[1] + len(targets)]
        self._documents += 1
        self._text_bytes += text_bytes

    def _write_sample(self) -> None:
        if self._writer is None:
            path = self._folder / self._split / self._source / next(self._names)
            self._writer = ShardWriter(path, self._layout)
        inputs = np.full(self._room["inputs.npy"], self._pad, np.int64)
        targets = np.full(self._room["targets.npy"], self._pad, np.int64)
        offsets = np.zeros(self._layout.by_name["offsets.npy"].shape, np.int32)
        tasks = np.zeros(self._room["tasks.npy"], f"S{TASK_NAME_BYTES}")
        for index, (input_ids, target_ids, task) in enumerate(self._rows):
            begin = offsets[index].copy()
            end = begin + np.array([len(input_ids), len(target_ids)], np.int32)
            inputs[begin[0] : end[0]] = input_ids
            targets[begin[1] : end[1]] = target_ids
            offsets[index + 1 :] = end
            tasks[index] = task
        self._tokens += int(offsets[-1].sum())
        self._rows, self._filled = [], [0, 0]
        arrays = {"inputs.npy": inputs, "targets.npy": targets}
        self._writer.add({**arrays, "offsets.npy": offsets, "tasks.npy": tasks})
        if self._writer.samples == self._limit:
            self._close_shard(self._writer)

    def _close_shard(self, writer: ShardWriter) -> None:
        written = writer.close()
        self._shards.append(
            Shard(
                path=writer.path.relative_to(self._folder).as_posix(),
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

    def close(self) -> list[Shard]:
        """Write what waits; the shards."""
        if self._rows:
            self._write_sample()
        if self._writer is not None:
            self._close_shard(self._writer)
        return self._shards


class _ShardRows:
    """One open shard and the number of rows before each of its samples."""

    def __init__(self, file: Path, shard: Shard, layout: SampleLayout) -> None:
        self.reader = ShardReader(file, layout, shard.samples, shard.path)
        # Every row has at least [EOD] for a target, so its targets' offsets tell it from none.
        counts = [
            int(np.count_nonzero(np.diff(self.reader.read(sample, "offsets.npy")[:, 1])))
            for sample in range(shard.samples)
        ]
        self.starts = np.concatenate([[0], np.cumsum(counts)])


class FlanStore:
    """Row `index` of one split of a FLAN folder.

    Args:
        folder: made by isoflop flan.
        split: "train" or "heldout".

    Raises:
        UserError: no manifest, no FLAN folder, or no such split.
    """

    def __init__(self, folder: str | Path, split: str) -> None:
        self.folder = Path(folder)
        self.split = split
        self.manifest = read_manifest(folder)
        if self.manifest.kind != "flan":
            raise UserError(
                f"data={str(folder)!r}: holds {self.manifest.kind}, not FLAN rows; give the "
                "--output of isoflop flan"
            )
        self._cache = cache_of(folder)
        self._shards = self.manifest.select(split)
        if not self._shards:
            raise UserError(
                f"split={split!r}: {folder} holds only {', '.join(self.manifest.splits())}"
            )
        self._layout = flan_layout(self.manifest.block_tokens, self.manifest.dtype)
        self._ends = np.cumsum([shard.documents for shard in self._shards])
        self._open: dict[int, _ShardRows] = {}

    def __len__(self) -> int:
        """Number of rows."""
        return int(self._ends[-1])

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray, str]:
        """Inputs ids [source], targets ids [target] (the last is [EOD]), and the task's name.

        Raises:
            IndexError: no such row.
            CorruptShardError: what is stored is not what was written.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"{self.split} of {self.folder} has {len(self)} rows, not {index}")
        number = int(np.searchsorted(self._ends, index, side="right"))
        rows = self._open.get(number)
        if rows is None:
            shard = self._shards[number]
            rows = self._open[number] = _ShardRows(self._file_of(shard), shard, self._layout)
        inside = index - (int(self._ends[number - 1]) if number else 0)
        sample = int(np.searchsorted(rows.starts, inside, side="right")) - 1
        row = inside - int(rows.starts[sample])
        begin, end = rows.reader.read(sample, "offsets.npy", row, 2).tolist()
        inputs = rows.reader.read(sample, "inputs.npy", begin[0], end[0] - begin[0])
        targets = rows.reader.read(sample, "targets.npy", begin[1], end[1] - begin[1])
        task = bytes(rows.reader.read(sample, "tasks.npy", row, 1)[0]).decode()
        return inputs, targets, task

    def _file_of(self, shard: Shard) -> Path:
        return self.folder / shard.path if self._cache is None else self._cache.file(shard)

    def longest_row(self) -> int:
        """Most tokens of inputs and targets together in any row."""
        longest = 0
        for shard in self._shards:
            reader = ShardReader(self._file_of(shard), self._layout, shard.samples, shard.path)
            for sample in range(shard.samples):
                offsets = reader.read(sample, "offsets.npy")
                longest = max(longest, int(np.diff(offsets, axis=0).sum(1).max(initial=0)))
        return longest

    def evaluation_choice(self, count: int) -> list[int]:
        """`count` rows (or all) drawn without repeat, the same for every seed."""
        count = min(count, len(self))
        return sorted(Permutation(len(self), _EVALUATION_KEY)(np.arange(count)).tolist())

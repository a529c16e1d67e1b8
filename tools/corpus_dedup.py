"""Exact duplicates: of equal texts the first in input order stays, for any number of workers.

One pass hashes every document (XXH3, 128 bit) and leaves the hashes of each task sorted. The hashes
are then merged range by range, so that memory does not grow with the corpus, into one byte for
every document: keep it, or why not.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import xxhash

from pipeline.atomic import partial_path, put_into_place, write_atomically
from pipeline.options import UserError
from tools.corpus_plan import Settings, Task
from tools.corpus_records import file_digest, stamp
from tools.corpus_rows import Document
from tools.corpus_stage import Counts, Stage
from tools.corpus_streams import Reading
from tools.corpus_tasks import task_documents

DUPLICATE, NEAR_DUPLICATE = 1, 2
REASONS = {DUPLICATE: "duplicate", NEAR_DUPLICATE: "near duplicate"}
RANGE_DOCUMENTS = 1 << 21  # merged at once: some 100 bytes each


def hashes_path(output: Path, task: int) -> Path:
    """Sorted hashes of a task: high halves, low halves [documents] uint64, ordinals uint32."""
    return output / "tasks" / f"{task:06d}.hashes"


def mark_path(output: Path, task: int) -> Path:
    """Says that the hashes are whole: their number and checksum, and that of what was read."""
    return output / "tasks" / f"{task:06d}.hashed"


def hash_task(task: Task, settings: Settings, output: Path, *, in_worker: bool = False) -> None:
    """Leave the hashes of one task's documents."""
    digests = bytearray()
    reading = Reading(task.begin, task.end)
    for row in task_documents(task, settings, reading):
        if isinstance(row, Document):
            digests += xxhash.xxh3_128_digest(row.data)
    halves = np.frombuffer(digests, ">u8").reshape(-1, 2).astype(np.uint64)
    high, low = halves[:, 0], halves[:, 1]
    order = np.lexsort((low, high))
    path = hashes_path(output, task.id)
    content = b"".join([high[order].tobytes(), low[order].tobytes(), order.astype("u4").tobytes()])
    write_atomically(path, content)
    told = {"documents": len(order), "xxh3": xxhash.xxh3_64_hexdigest(content)}
    write_atomically(mark_path(output, task.id), json.dumps({**told, "read": reading.digest()}))
    stamp(mark_path(output, task.id), reading.changed)


def _hashed(output: Path, task: int) -> Counts | None:
    try:
        told = json.loads(mark_path(output, task).read_bytes())
        return (0, 0) if file_digest(hashes_path(output, task)) == told["xxh3"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


HASH = Stage("hash documents", hash_task, mark_path, _hashed)


class Drops:
    """One byte for every document of every task: 0, or why it is not used (see `REASONS`).

    Raises:
        OSError, ValueError: the file is absent or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        told = json.loads(_index_path(path).read_bytes())
        self._first: list[int] = told["first"]
        self._digests: list[str] = told["xxh3"]

    def of(self, task: int) -> np.ndarray:
        """Those of one task, uint8 [documents]."""
        begin, end = self._first[task], self._first[task + 1]
        found = np.fromfile(self.path, np.uint8, end - begin, offset=begin)
        if len(found) != end - begin or xxhash.xxh3_64_hexdigest(found) != self._digests[task]:
            raise ValueError(f"{self.path} is damaged; remove it and give the same command again")
        return found


def _index_path(path: Path) -> Path:
    return path.with_suffix(".index")


def exact_path(output: Path) -> Path:
    """The drops that exact duplicates are."""
    return output / "tasks" / "exact.drops"


def document_counts(output: Path, tasks: Sequence[Task]) -> list[int]:
    """Documents of each task, as its hashes say."""
    marks = (json.loads(mark_path(output, task.id).read_bytes()) for task in tasks)
    return [mark["documents"] for mark in marks]


def write_drops(path: Path, counts: Sequence[int], drops: np.ndarray) -> None:
    """Put drops, uint8 [all documents], into place with their index."""
    first = [0, *np.cumsum(counts, dtype=np.int64).tolist()]
    digests = [
        xxhash.xxh3_64_hexdigest(np.ascontiguousarray(drops[begin:end]))
        for begin, end in pairwise(first)
    ]
    # The drops come last: that they are there says that this is done.
    write_atomically(_index_path(path), json.dumps({"first": first, "xxh3": digests}))
    partial = partial_path(path)
    with open(partial, "wb") as file:
        drops.tofile(file)
        file.flush()
        os.fsync(file.fileno())
    put_into_place(partial, path)


def find_duplicates(output: Path, tasks: Sequence[Task]) -> None:
    """Merge the hashes of all tasks; leaves `exact.drops`."""
    path = exact_path(output)
    counts = document_counts(output, tasks)
    first = [0, *np.cumsum(counts, dtype=np.int64).tolist()]
    drops = np.zeros(first[-1], np.uint8)
    ranges = max(1, math.ceil(first[-1] / RANGE_DOCUMENTS))
    edges = np.array([2**64 * k // ranges for k in range(1, ranges)], np.uint64)
    bounds = []
    for task, count in zip(tasks, counts, strict=True):
        high = _column(output, task.id, count, 0)
        bounds.append([0, *np.searchsorted(high, edges).tolist(), count])
    for part in range(ranges):
        columns: list[list[np.ndarray]] = [[], [], []]
        for index, (task, count) in enumerate(zip(tasks, counts, strict=True)):
            begin, end = bounds[index][part], bounds[index][part + 1]
            for column in range(3):
                values = _column(output, task.id, count, column)[begin:end]
                columns[column].append(values + np.uint64(first[index] * (column == 2)))
        high, low, place = (np.concatenate(parts) for parts in columns)
        order = np.lexsort((place, low, high))
        high, low, place = high[order], low[order], place[order]
        again = (high[1:] == high[:-1]) & (low[1:] == low[:-1])
        drops[place[1:][again]] = DUPLICATE
    write_drops(path, counts, drops)


def _column(output: Path, task: int, count: int, column: int) -> np.ndarray:
    if not count:
        return np.zeros(0, np.uint64)
    dtype = np.uint32 if column == 2 else np.uint64
    return np.memmap(hashes_path(output, task), dtype, "r", column * 8 * count, (count,))


@lru_cache(maxsize=2)
def _drops(path: Path, written: int) -> Drops:
    """Kept: the index tells of all tasks, and is asked for each of them."""
    return Drops(path)


def read_drops(path: Path, task: int) -> np.ndarray:
    """The drops of one task. Raises UserError when they are absent or damaged."""
    try:
        return _drops(path, _index_path(path).stat().st_mtime_ns).of(task)
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(f"output: {error}; remove {path} and give the same command again") from None

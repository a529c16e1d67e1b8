"""The order in which training sees sequences, and batches of them read in that order."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.data.ahead import FetchAhead
from pipeline.data.manifest import Shard
from pipeline.data.mixture import StagedMixture
from pipeline.data.order import ShuffleWindow, WindowedOrder, derive_key
from pipeline.data.sequences import SequenceStore
from pipeline.options import UserError

__all__ = ["SampleBatch", "SequenceStore", "TrainingOrder"]

_PLANNED_FIRST = 512  # sequences whose order is worked out for the first batch
_PLANNED_AT_ONCE = 8192  # and for those that follow, together, which vectorises
_READ_AHEAD = 256  # sequences that the kernel is asked for before they are read
_LOOK_BATCHES = 16  # batches after which it is looked which shards of a URL come next
_PIECE = 1 << 16  # bytes asked for together where a window fits in memory
_PROBE = 16  # batches over which it is seen whether reads wait for the disk
_AHEAD_BATCHES = 4096  # batches with read-ahead before it is seen again


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
        weights: source to weight; by default natural proportions, exactly: after a pass over all
            sequences each was seen once.
        weight_stages: position to the weights that hold from there on, in place of `weights`.

    Raises:
        UserError: weights for a source that is not there, none above zero, or a bad window.
    """

    def __init__(
        self,
        store: SequenceStore,
        seed: int,
        shuffle_window: ShuffleWindow = "all",
        weights: Mapping[str, float] | None = None,
        weight_stages: Mapping[int, Mapping[str, float]] | None = None,
    ) -> None:
        self.store = store
        stages: dict[int, Mapping[str, float] | None] = {**(weight_stages or {}), 0: weights}
        named = {name for stage in stages.values() for name in stage or ()}
        unknown = sorted(named - set(store.sources))
        if unknown:
            raise UserError(
                f"weights={unknown[0]!r}: no such source in {store.folder}; it has "
                f"{', '.join(store.sources)}"
            )
        try:
            self.mixture = StagedMixture(stages, store.num_sequences)
            self._orders = [
                WindowedOrder(
                    store.shard_sequences(name), derive_key(seed, *name.encode()), shuffle_window
                )
                for name in self.mixture.sources
            ]
        except ValueError as error:
            raise UserError(str(error)) from None
        needed = store.window_bytes(self.mixture.sources, shuffle_window)
        if store.cache is not None and needed > store.cache.limit_bytes:
            raise UserError(
                f"cache_gb={store.cache.limit_bytes / 1e9:g}: two windows of every source take "
                f"{needed / 1e9:.3f} GB (shuffle_window={shuffle_window}); give more, or a smaller "
                "shuffle_window"
            )
        self._sizes = np.array([len(order) for order in self._orders], np.int64)
        columns = [store.sources.index(name) for name in self.mixture.sources]
        self._first_numbers = store.first_numbers[columns]
        self._planned = _Planned({}, *[np.zeros(0, np.int64)] * 3)
        self._disk = _DiskWatch()
        # `needed` is of two windows: while one is read, the next is begun.
        self._piece = _PIECE if 2 * needed < memory_to_spare() else 1
        self._looked = -1
        self._fetcher = None if store.cache is None else FetchAhead(store.cache)

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Source index (into `mixture.sources`), epoch of that source, sequence index: int64."""
        source, number = self.mixture.locate(positions)
        epoch, inside = np.divmod(number, self._sizes[source])
        index = np.empty_like(inside)
        # Sets: np.unique imports numpy.ma, a third of what a first batch takes.
        for s in sorted(set(source.tolist())):
            for e in sorted(set(epoch[source == s].tolist())):
                chosen = (source == s) & (epoch == e)
                index[chosen] = self._orders[s].locate(e, inside[chosen])
        return source, epoch, index

    def epochs(self, position: int) -> dict[str, float]:
        """How often each source has been gone through when `position` samples were seen."""
        counts = self.mixture.counts(position)
        return {name: counts[name] / self.store.num_sequences[name] for name in counts}

    def sample(self, position: int) -> tuple[int, np.ndarray, int]:
        """Sample number, ids [seq_len] and valid length at one position."""
        batch = self.batch(position, 1)
        return int(batch.sample_numbers[0]), batch.ids[0], int(batch.valid[0])

    def batch(self, start: int, count: int, stride: int | None = None) -> SampleBatch:
        """Samples at positions [start, start + count).

        Args:
            stride: how far on the next batch begins that will be asked for; by default `count`.
                It decides what is prepared and read ahead, never what is returned. Where it is
                given, the shards of this window and the next are fetched from a URL beside it.

        Raises:
            CorruptShardError: what is stored is not what was written.
        """
        row = self._planned.first_rows.get((start, count))
        if row is None:
            together = _PLANNED_AT_ONCE if self._planned.first_rows else _PLANNED_FIRST
            self._planned = self._plan(start, count, stride or count, together)
            row = 0
        if self._fetcher is not None and stride is not None:
            look = start // (stride * _LOOK_BATCHES)
            if look != self._looked:
                self._looked = look
                self._fetcher.want(self.shards_ahead(start))
        planned, end = self._planned, row + count
        if self._disk.is_slow():
            if self._disk.began:
                self.store.table.forget_asked()
            # The first batch of a plan asks for those after it too, the others for one more each.
            reach = max(1, _READ_AHEAD // count) * count
            begin = end if row == 0 else row + reach
            self.store.table.will_need(planned.reads[begin : end + reach], self._piece)
        ids = self.store.table.read(planned.reads[row:end])
        return SampleBatch(planned.numbers[row:end], ids, planned.valid[row:end])

    def shards_ahead(self, position: int) -> list[Shard]:
        """The shards of each source's window at `position`, then those of its next one."""
        counts, store = self.mixture.counts(position), self.store
        ahead: list[Shard] = []
        for name, order in zip(self.mixture.sources, self._orders, strict=True):
            shards = store.manifest.select(store.split, name)
            ahead += [shards[i] for i in order.shards_ahead(*divmod(counts[name], len(order)))]
        return ahead

    def _plan(self, start: int, count: int, stride: int, together: int) -> _Planned:
        """Work out this batch and those after it, about `together` sequences."""
        batches = max(1, together // count)
        starts = start + np.arange(batches) * stride
        source, _, index = self.locate((starts[:, None] + np.arange(count)).reshape(-1))
        numbers = self._first_numbers[source] + index
        rows = {(first, count): row * count for row, first in enumerate(starts.tolist())}
        return _Planned(rows, numbers, self.store.table.plan(numbers), self.store.valid(numbers))


@dataclass(frozen=True)
class _Planned:
    """Several batches that were worked out together.

    Attributes:
        first_rows: (first position, count) of a batch to its first row in the arrays.
        numbers: sample numbers, int64 [rows].
        reads: from `ShardTable.plan`, int64 [rows, 5].
        valid: int64 [rows].
    """

    first_rows: dict[tuple[int, int], int]
    numbers: np.ndarray
    reads: np.ndarray
    valid: np.ndarray


class _DiskWatch:
    """Whether reads wait for the disk, seen from this thread's major page faults.

    Asking the kernel costs about as much as reading a page that is in memory, so nothing is asked
    for while everything is. What is asked for comes without faults: now and then it is seen again
    without asking.

    Attributes:
        began: whether the last answer was the first that said so.
    """

    def __init__(self) -> None:
        self._batches = 0
        self._faults = -1
        self._slow = False
        self.began = False

    def is_slow(self) -> bool:
        """Whether to ask for what comes next; called once a batch."""
        self._batches += 1
        before = self._slow
        if self._slow:
            if self._batches >= _AHEAD_BATCHES:
                self._slow, self._batches, self._faults = False, 0, -1
        elif self._batches >= _PROBE or self._faults < 0:
            faults = resource.getrusage(resource.RUSAGE_THREAD).ru_majflt
            self._slow = 0 <= self._faults < faults
            self._faults, self._batches = faults, 0
        self.began = self._slow and not before
        return self._slow


def memory_to_spare() -> int:
    """Bytes that this machine, or the control group of this process, could still fill; 0: unknown.

    Only what other files' pages take is given up for it.
    """
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(int(line.split()[1]) << 10 for line in lines if "MemAvailable" in line)
    except (OSError, ValueError, StopIteration):
        return 0
    with contextlib.suppress(OSError, ValueError):  # no control group, or no limit
        available = min(available, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return available

"""Every sample once an epoch, the same global batches on any world, wherever a run goes on."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data import loader
from pipeline.data.loader import TrainingOrder
from pipeline.data.manifest import Manifest, Shard, TokenizerInfo, write_manifest
from pipeline.data.sequences import SequenceStore
from pipeline.data.shards import ShardReader

settings_of_orders = {
    "seed": st.integers(0, 99),
    "window": st.one_of(st.just("all"), st.integers(1, 5)),
    "weights": st.one_of(
        st.none(),
        st.fixed_dictionaries({"book": st.floats(0.1, 5), "github": st.floats(0.1, 5)}),
    ),
    "stages": st.dictionaries(
        st.integers(1, 400), st.just({"github": 1.0, "common_crawl": 2.0}), max_size=1
    ),
}


@settings(deadline=None, max_examples=5)
@given(**settings_of_orders, step=st.integers(0, 40))
def test_a_steps_global_batch_is_the_same_on_any_number_of_ranks(
    shards, seed, window, weights, stages, step
):
    store = SequenceStore(shards, "train", 64)
    start = step * 24
    whole = TrainingOrder(store, seed, window, weights, stages).batch(start, 24)
    for ranks in (1, 2, 3, 8):
        share = 24 // ranks
        orders = [TrainingOrder(store, seed, window, weights, stages) for _ in range(ranks)]
        # Each rank goes on from the step before, or starts here: it makes no difference.
        if step and seed % 2:
            for rank, order in enumerate(orders):
                order.batch(start - 24 + rank * share, share, stride=24)
        parts = [o.batch(start + r * share, share, stride=24) for r, o in enumerate(orders)]
        for name in ("sample_numbers", "ids", "valid"):
            joined = np.concatenate([getattr(part, name) for part in parts])
            assert np.array_equal(joined, getattr(whole, name))


@settings(deadline=None, max_examples=20)
@given(**settings_of_orders)
def test_each_source_gives_every_sample_once_before_any_twice(
    shards, seed, window, weights, stages
):
    store = SequenceStore(shards, "train", 64)
    order = TrainingOrder(store, seed, window, weights, stages)
    source, epoch, index = order.locate(np.arange(3000))
    for number, name in enumerate(order.mixture.sources):
        mine = source == number
        # The epochs of a source follow one another, each a permutation of all of it.
        assert (np.diff(epoch[mine]) >= 0).all()
        for e in range(epoch[mine].max() if mine.any() else 0):
            seen = np.sort(index[mine & (epoch == e)])
            assert np.array_equal(seen, np.arange(store.num_sequences[name]))
        last = index[mine & (epoch == (epoch[mine].max() if mine.any() else 0))]
        assert len(set(last.tolist())) == len(last)


def synthetic(folder: Path, shards: int, samples: int) -> int:
    """A manifest of shards that are not there; the number of blocks."""
    block = 131_072
    rows = tuple(
        Shard(f"train/a/s-{n:06d}.tar", "train", "a", samples, samples * block, 9, 9, 1, "0" * 64)
        for n in range(shards)
    )
    info = TokenizerInfo("0" * 64, 1 << 15, {"pad": 0, "bos": 1, "eod": 2})
    write_manifest(folder, Manifest("tokens", "uint16", block, info, {}, rows, ()))
    return shards * samples


def test_the_index_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    import tracemalloc

    blocks = synthetic(tmp_path, 2500, 40_000)
    assert blocks == 10**8
    tracemalloc.start()
    order = TrainingOrder(SequenceStore(tmp_path, "train", 2048), 1, "all")
    order.locate(np.arange(order.store.total - 9000, order.store.total))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert order.store.total == blocks * 64
    assert peak < 64 << 20


def test_the_first_batch_after_a_resume_is_quick_at_any_position(shards: Path) -> None:
    store = SequenceStore(shards, "train", 64)
    spent = []
    for position in (0, 10**6, 10**12, 3 * 10**15):
        started = time.process_time()
        TrainingOrder(store, 5).batch(position, 8)
        spent.append(time.process_time() - started)
    assert min(spent) < 0.05
    # Wherever it is: nothing is replayed. The limit is loose, for machines under load.
    assert max(spent) < 0.5


@pytest.mark.soak
def test_a_hundred_million_blocks_in_small_shards_stay_under_two_gigabytes(tmp_path: Path) -> None:
    import resource

    synthetic(tmp_path, 200_000, 500)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    order = TrainingOrder(SequenceStore(tmp_path, "train", 2048), 1, 16)
    order.locate(np.arange(10**9, 10**9 + 9000))
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) < 2 << 20


def test_read_ahead_asks_for_each_sequence_once_and_changes_nothing(shards, monkeypatch):
    store = SequenceStore(shards, "train", 64)
    expected = TrainingOrder(store, 2).batch(0, 96).ids
    asked = []
    will_need = store.table.will_need

    def noted(plan, piece):
        asked.extend(plan.tolist())
        will_need(plan, piece)

    monkeypatch.setattr(store.table, "will_need", noted)
    order = TrainingOrder(store, 2)
    monkeypatch.setattr(order._disk, "is_slow", lambda: True)
    found = np.concatenate([order.batch(start, 8).ids for start in range(0, 96, 8)])
    assert np.array_equal(found, expected)
    first, count = store.table.plan(order._planned.numbers[8:]).tolist(), len(asked)
    # What follows the first batch, in order, well ahead of what was read.
    assert asked == first[:count]
    assert count >= 96 + 128


@pytest.mark.parametrize("fits", [True, False])
def test_where_a_window_fits_in_memory_whole_pieces_are_asked_for_once(shards, monkeypatch, fits):
    store = SequenceStore(shards, "train", 64)
    needed = store.window_bytes(store.sources, "all")
    monkeypatch.setattr(loader, "memory_to_spare", lambda: 2 * needed + fits)
    monkeypatch.setattr(loader, "_PIECE", 4096)
    asked, will_need = [], ShardReader.will_need

    def noted(self, begin, end):
        asked.append((self.path, begin, end))
        will_need(self, begin, end)

    monkeypatch.setattr(ShardReader, "will_need", noted)
    order = TrainingOrder(store, 2)
    monkeypatch.setattr(order._disk, "is_slow", lambda: True)
    for start in range(0, store.total, 8):
        order.batch(start, 8)
    repeats = len(asked) - len(set(asked))
    whole = all(begin % 4096 == end % 4096 == 0 for _, begin, end in asked)
    assert (repeats == 0, whole) == (fits, fits)
    if fits:
        # What was forgotten is asked for again.
        before = len(asked)
        monkeypatch.setattr(order._disk, "began", True)
        order.batch(store.total, 8)
        assert len(asked) > before

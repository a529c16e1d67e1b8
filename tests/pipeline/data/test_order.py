import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.order import Permutation, WindowedOrder, derive_key


@settings(deadline=None)
@given(n=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
def test_permutation_is_one(n, key):
    image = Permutation(n, key)(np.arange(n))
    assert np.array_equal(np.sort(image), np.arange(n))


@settings(deadline=None)
@given(n=st.integers(1, 1 << 62), key=st.integers(0, 2**64 - 1), data=st.data())
def test_permutation_of_any_size_stays_inside_and_one_to_one(n, key, data):
    positions = data.draw(st.lists(st.integers(0, n - 1), unique=True, max_size=50))
    image = Permutation(n, key)(np.array(positions, np.int64))
    assert len(set(image.tolist())) == len(positions)
    assert all(0 <= i < n for i in image.tolist())


def test_permutation_depends_on_its_key_and_looks_shuffled():
    first, second = (Permutation(10_000, key)(np.arange(10_000)) for key in (1, 2))
    assert (first == second).mean() < 0.01
    assert abs(np.corrcoef(first, np.arange(10_000))[0, 1]) < 0.05
    neighbours = np.abs(np.diff(first))
    assert neighbours.mean() == pytest.approx(10_000 / 3, rel=0.1)


def test_order_never_changes_between_versions():
    # A run that is resumed by a later version must go on in the same order.
    assert Permutation(1000, 7)(np.arange(5)).tolist() == [223, 677, 569, 833, 462]
    assert derive_key(1, 2, 3) == 6697474222442170948


shard_sizes = st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(lambda s: sum(s) > 0)
windows = st.one_of(st.just("all"), st.integers(1, 14))


@settings(deadline=None)
@given(sizes=shard_sizes, seed=st.integers(0, 2**32), window=windows, epoch=st.integers(0, 5))
def test_every_sample_once_an_epoch(sizes, seed, window, epoch):
    order = WindowedOrder(sizes, seed, window)
    located = order.locate(epoch, np.arange(len(order)))
    assert np.array_equal(np.sort(located), np.arange(sum(sizes)))


@settings(deadline=None)
@given(
    sizes=shard_sizes, seed=st.integers(0, 2**32), window=st.integers(1, 5), epoch=st.integers(0, 3)
)
def test_a_window_holds_whole_shards_only(sizes, seed, window, epoch):
    order = WindowedOrder(sizes, seed, window)
    shard_of = np.repeat(np.arange(len(sizes)), sizes)
    shards = shard_of[order.locate(epoch, np.arange(len(order)))]
    for shard in np.unique(shards):
        span = shards[np.flatnonzero(shards == shard)[0] : np.flatnonzero(shards == shard)[-1] + 1]
        assert len(np.unique(span)) <= window


@settings(deadline=None)
@given(sizes=shard_sizes, seed=st.integers(0, 99), window=windows)
def test_position_alone_decides(sizes, seed, window):
    order, other = WindowedOrder(sizes, seed, window), WindowedOrder(sizes, seed, window)
    whole = order.locate(1, np.arange(len(order)))
    one_by_one = [int(other.locate(1, np.array([p]))[0]) for p in range(len(other))]
    other.locate(0, np.arange(1))
    assert whole.tolist() == one_by_one


@pytest.mark.parametrize("sizes", [[100], [50, 50]])
@pytest.mark.parametrize("window", ["all", 1])
def test_epochs_and_seeds_differ(sizes, window):
    positions = np.arange(100)
    first = WindowedOrder(sizes, 3, window).locate(0, positions)
    for seed, epoch in [(3, 1), (4, 0)]:
        other = WindowedOrder(sizes, seed, window).locate(epoch, positions)
        assert (first != other).mean() > 0.8


def test_window_of_zero_is_refused():
    with pytest.raises(ValueError, match="shuffle_window=0"):
        WindowedOrder([3], 0, 0)

"""Natural proportions are exact: after each pass every source was seen once, however small."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline.data.loader import TrainingOrder
from pipeline.data.mixture import StagedMixture
from pipeline.data.natural import NaturalMixture
from pipeline.data.sequences import SequenceStore
from tests.pipeline.data.manifests import redpajama

sizes = st.lists(
    st.one_of(st.integers(0, 9), st.integers(0, 2000)), min_size=1, max_size=9
).filter(any)  # fmt: skip
huge = st.lists(st.integers(1, 10**13), min_size=1, max_size=30)


def mixture_of(counts: list[int]) -> NaturalMixture:
    return NaturalMixture({f"s{number:02d}": count for number, count in enumerate(counts)})


@settings(deadline=None, max_examples=50)
@given(sizes)
def test_each_pass_sees_every_sample_of_every_source_once(counts: list[int]) -> None:
    mixture, total = mixture_of(counts), sum(counts)
    source, number = mixture.locate(np.arange(3 * total))
    for index, count in enumerate(counts):
        assert number[source == index].tolist() == list(range(3 * count))
        for one in range(3):
            assert (source[one * total : (one + 1) * total] == index).sum() == count


@settings(deadline=None, max_examples=50)
@given(sizes)
@example([13, 8, 5, 3, 2, 1, 1])
@example([1, 10, 100, 1000, 10_000])
def test_no_prefix_is_two_samples_off(counts: list[int]) -> None:
    source, _ = mixture_of(counts).locate(np.arange(sum(counts)))
    seen = np.cumsum(source[:, None] == np.arange(len(counts)), axis=0)
    exact = np.outer(np.arange(1, sum(counts) + 1), counts) / sum(counts)
    assert np.abs(seen - exact).max() < 2


@settings(deadline=None, max_examples=50)
@given(huge, st.integers(0, 1 << 50), st.integers(1, 60))
def test_of_any_size_positions_and_counts_are_exact(counts, start, length) -> None:
    mixture, total = mixture_of(counts), sum(counts)
    assert list(mixture.counts(3 * total).values()) == [3 * count for count in counts]
    expected = mixture.counts(start)
    for name, count in zip(mixture.sources, counts, strict=True):
        assert abs(expected[name] - Fraction(start * count, total)) < 2
    source, number = mixture.locate(np.arange(start, start + length))
    for s, n in zip(source.tolist(), number.tolist(), strict=True):
        assert n == expected[mixture.sources[s]]
        expected[mixture.sources[s]] += 1
    assert expected == mixture.counts(start + length)


def test_positions_may_come_in_any_order_and_shape() -> None:
    mixture = mixture_of([700, 200, 3])
    positions = np.random.default_rng(0).integers(0, 5000, (7, 11))
    source, number = mixture.locate(positions)
    whole = mixture.locate(np.arange(5000))
    assert np.array_equal(source, whole[0][positions])
    assert np.array_equal(number, whole[1][positions])


@pytest.mark.parametrize("bad", [{}, {"a": 0}, {"a": -1, "b": 2}])
def test_sources_without_a_sample_are_refused(bad) -> None:
    with pytest.raises(ValueError, match="samples="):
        NaturalMixture(bad)


def test_a_stage_of_weights_follows_a_natural_one() -> None:
    natural = {"a": 30, "b": 10}
    mixture = StagedMixture({0: None, 20: {"a": 1, "b": 3}}, natural)
    source, number = mixture.locate(np.arange(60))
    assert np.bincount(source[:20]).tolist() == [15, 5]
    assert np.bincount(source[20:]).tolist() == [10, 30]
    assert number[source == 1].tolist() == list(range(35))
    assert mixture.counts(60) == {"a": 25, "b": 35}


def test_a_tiny_source_beside_redpajama_comes_once_a_pass(tmp_path: Path) -> None:
    redpajama(tmp_path, {"notes": 20_000})
    order = TrainingOrder(SequenceStore(tmp_path, "train", 2048), 1)
    total = order.store.total
    assert total > 590_000_000
    assert order.store.num_sequences["notes"] == 10
    assert set(order.epochs(total).values()) == {1.0}
    # `max_epochs` ends a run where its fastest source has come so often.
    assert max(order.epochs(total // 2).values()) < 0.6
    assert max(order.epochs(total - 1).values()) <= 1
    for near in (0, total // 20, total // 2, total - 1000):
        source, epoch, _ = order.locate(np.arange(near, near + 1000))
        assert epoch.max() == 0
        shares = {name: (source == s).mean() for s, name in enumerate(order.mixture.sources)}
        assert shares["common_crawl"] == pytest.approx(878 / 1210, abs=0.005)

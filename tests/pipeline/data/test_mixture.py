import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.mixture import PERIOD, Mixture, quantise, quota_sequence

weights = st.lists(st.one_of(st.just(0.0), st.floats(1e-6, 1e6)), min_size=1, max_size=9).filter(
    lambda values: sum(values) > 0
)


@settings(deadline=None)
@given(weights)
def test_quanta_sum_to_the_period_and_keep_every_source(values):
    quanta = quantise(values)
    assert quanta.sum() == PERIOD
    assert all((q > 0) == (w > 0) for q, w in zip(quanta, values, strict=True))


def test_quanta_are_the_nearest():
    assert quantise([1, 1]).tolist() == [PERIOD // 2] * 2
    exact = np.array([878, 175, 59, 26, 28, 24, 20]) / 1210 * PERIOD
    assert np.abs(quantise([878, 175, 59, 26, 28, 24, 20]) - exact).max() < 1


@settings(max_examples=25, deadline=None)
@given(weights)
def test_no_prefix_is_a_whole_sample_off(values):
    quanta = quantise(values)
    sequence = quota_sequence(quanta)
    positions = np.arange(1, PERIOD + 1)
    for source, quantum in enumerate(quanta):
        counts = np.cumsum(sequence == source)
        assert np.abs(counts * PERIOD - positions * quantum).max() < PERIOD


@settings(max_examples=25, deadline=None)
@given(weights, st.integers(0, 10 * PERIOD))
def test_numbers_within_a_source_count_up_without_a_gap(values, start):
    mixture = Mixture({f"s{index}": weight for index, weight in enumerate(values)})
    expected = mixture.counts(start)
    source, number = mixture.locate(np.arange(start, start + 500))
    for s, n in zip(source.tolist(), number.tolist(), strict=True):
        assert n == expected[mixture.sources[s]]
        expected[mixture.sources[s]] += 1
    assert expected == mixture.counts(start + 500)


@pytest.mark.parametrize("bad", [{}, {"a": 0}, {"a": -1, "b": 2}, {"a": float("nan")}])
def test_impossible_weights_are_refused(bad):
    with pytest.raises(ValueError, match="weights="):
        Mixture(bad)

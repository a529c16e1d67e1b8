import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.mixture import PERIOD, Mixture, StagedMixture, quantise, quota_sequence

# SHA-256 of the sequences of these weights, which runs that have begun go on with.
MADE_BEFORE = {
    (878, 175, 59, 26, 28, 24, 20): "97679bd472694749",
    (3, 1, 1e-9): "15bb76e3f0ba8426",
}

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


@pytest.mark.parametrize("given_weights", MADE_BEFORE)
def test_sequences_never_change_between_versions(given_weights):
    sequence = quota_sequence(quantise(given_weights)).astype("<u2")
    digest = hashlib.sha256(sequence.tobytes()).hexdigest()
    assert digest[:16] == MADE_BEFORE[given_weights]


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


stages = st.dictionaries(
    st.integers(1, 3 * PERIOD),
    st.dictionaries(st.sampled_from("abcd"), st.floats(0.01, 10), min_size=1),
    max_size=3,
)


@settings(max_examples=15, deadline=None)
@given(stages, st.integers(0, 4 * PERIOD))
def test_weights_may_change_and_no_source_repeats_or_leaves_out_a_sample(later, start):
    mixture = StagedMixture({0: {"a": 2, "b": 1}, **later})
    edges = {position for begin in later for position in (begin - 3, begin + 3)}
    for position in sorted({start, *(e for e in edges if e >= 0)}):
        expected = mixture.counts(position)
        source, number = mixture.locate(np.arange(position, position + 200))
        for s, n in zip(source.tolist(), number.tolist(), strict=True):
            assert n == expected[mixture.sources[s]]
            expected[mixture.sources[s]] += 1
        assert expected == mixture.counts(position + 200)


def test_each_stage_keeps_its_own_weights():
    mixture = StagedMixture({0: {"a": 1}, 100: {"a": 1, "b": 3}, 500: {"b": 1}})
    source, _ = mixture.locate(np.arange(1000))
    assert np.bincount(source[:100], minlength=2).tolist() == [100, 0]
    assert np.bincount(source[100:500], minlength=2).tolist() == [100, 300]
    assert np.bincount(source[500:], minlength=2).tolist() == [0, 500]
    assert mixture.counts(1000) == {"a": 200, "b": 800}


def test_one_stage_is_the_mixture_itself():
    weights = {"x": 3.0, "y": 1.5}
    positions = np.arange(PERIOD + 77)
    for mine, plain in zip(
        StagedMixture({0: weights}).locate(positions), Mixture(weights).locate(positions),
        strict=True,
    ):  # fmt: skip
        assert np.array_equal(mine, plain)
    with pytest.raises(ValueError, match="sample 0"):
        StagedMixture({5: weights})

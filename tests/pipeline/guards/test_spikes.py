"""The robust score: what moves it, what does not, and when it speaks."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.guards.spikes import Spikes, score

losses = st.lists(st.floats(0.5, 20), min_size=9, max_size=40)


def test_it_counts_standard_deviations_of_a_normal_distribution() -> None:
    drawn = np.random.default_rng(0).normal(3.0, 0.1, 100_000).tolist()
    assert score(drawn, 3.5) == pytest.approx(5.0, rel=0.02)


@given(losses, st.floats(0.5, 20), st.floats(-5, 5), st.floats(0.1, 10))
def test_it_moves_with_the_losses(
    seen: list[float], loss: float, shift: float, scale: float
) -> None:
    plain = score(seen, loss)
    assert math.copysign(1, plain) == math.copysign(1, loss - float(np.median(seen))) or plain == 0
    assert score([scale * each for each in seen], scale * loss) == pytest.approx(
        plain, rel=1e-6, abs=1e-6
    )


@given(losses, st.floats(1e3, 1e9))
def test_a_few_spikes_in_the_window_hide_no_other(seen: list[float], spike: float) -> None:
    clean = [2.0 + each / 1000 for each in seen]
    few = clean[: len(clean) - len(clean) // 4] + [spike] * (len(clean) // 4)
    assert score(few, spike) > 100


def test_it_speaks_only_of_a_whole_window_and_of_numbers() -> None:
    spikes = Spikes(8, 6.0, [2.0, 2.1] * 3)
    assert not spikes.is_spike(100.0)
    spikes.add(2.0)
    spikes.add(2.1)
    assert spikes.is_spike(100.0)
    assert not spikes.is_spike(2.2)
    assert not spikes.is_spike(0.1)
    assert not spikes.is_spike(float("nan"))
    assert spikes.is_spike(float("inf"))
    for _ in range(8):
        spikes.add(100.0)
    assert not spikes.is_spike(100.0)
    assert "lies" in spikes.describe(200.0)


def test_losses_that_hardly_differ_make_no_spike_of_a_ripple() -> None:
    spikes = Spikes(8, 6.0, [2.0] * 8)
    assert not spikes.is_spike(2.01)
    assert spikes.is_spike(2.02)


def test_switched_off_it_keeps_nothing() -> None:
    spikes = Spikes(0, 6.0, [2.0] * 8)
    spikes.add(2.0)
    assert not spikes.losses
    assert not spikes.is_spike(1e9)

"""Steps and batches around discarded ones: properties, and against counting by hand."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pipeline.guards.positions import Positions

batches = st.frozensets(st.integers(0, 40), max_size=12)


@given(batches)
def test_steps_go_through_all_other_batches_in_their_order(discarded: frozenset[int]) -> None:
    left = [batch for batch in range(60) if batch not in discarded]
    positions = Positions(4, discarded)
    assert [positions.batch(step) for step in range(len(left))] == left
    assert positions.span(3) == (left[3] * 4, left[3] * 4 + 4)


@given(batches, st.integers(0, 40))
def test_a_discarded_batch_moves_no_step_before_it(discarded: frozenset[int], step: int) -> None:
    before = Positions(4, discarded)
    batch = before.batch(step)
    after = before.without([batch])
    assert [after.batch(each) for each in range(step)] == [before.batch(e) for e in range(step)]
    assert [after.batch(each) for each in range(step, 50)] == [
        before.batch(each + 1) for each in range(step, 50)
    ]
    # Twice is once, and in any order.
    assert after.without([batch]) == after


def test_without_discarded_batches_nothing_moves() -> None:
    assert [Positions(12).span(step) for step in (0, 1, 9)] == [(0, 12), (12, 24), (108, 120)]

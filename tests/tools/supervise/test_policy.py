"""What the end of an attempt means, and how often a run is started again."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tools.supervise.policy import LONGEST_WAIT, Restarts, Verdict, describe_code, judge


@pytest.mark.parametrize(
    ("code", "finished", "asked", "verdict"),
    [
        (0, True, False, Verdict.FINISHED),
        # A launcher that was killed after the run's last act, or a stop that came too late.
        (247, True, True, Verdict.FINISHED),
        # DeepSpeed's launcher says 0 where the process that starts the ranks was killed.
        (0, False, False, Verdict.CRASHED),
        (-9, False, False, Verdict.CRASHED),
        (247, False, False, Verdict.CRASHED),
        (1, False, False, Verdict.CRASHED),
        (2, False, False, Verdict.MISTAKE),
        (130, False, False, Verdict.STOPPED),
        (1, False, True, Verdict.STOPPED),
    ],
)
def test_success_is_read_from_the_marker_alone(
    code: int, finished: bool, asked: bool, verdict: Verdict
) -> None:
    assert judge(code, finished=finished, asked=asked) is verdict


@given(st.integers(0, 5), st.lists(st.integers(0, 3), max_size=40))
def test_restarts_in_a_row_without_a_new_checkpoint_are_bounded(
    limit: int, gains: list[int]
) -> None:
    restarts = Restarts(limit, 5.0)
    reached, fruitless = 0, 0
    for gain in gains:
        reached += gain
        fruitless = 0 if gain else fruitless + 1
        wait = restarts.wait_after_crash(reached)
        # After a new checkpoint the crash that follows is the first of its row.
        row = fruitless + (1 if reached else 0)
        if row > limit:
            assert wait is None
            return
        assert wait == min(5.0 * 2 ** (row - 1), LONGEST_WAIT)


def test_a_crash_that_repeats_waits_longer_each_time_up_to_a_bound() -> None:
    restarts = Restarts(9, 5.0, reached=40)
    waits = [restarts.wait_after_crash(40) for _ in range(10)]
    assert waits == [5, 10, 20, 40, 80, 160, 300, 300, 300, None]


def test_a_code_names_the_signal_that_the_launcher_passed_on() -> None:
    assert describe_code(247) == "exit code 247 (SIGKILL)"
    assert describe_code(-15) == "exit code -15 (SIGTERM)"
    assert describe_code(1) == "exit code 1"
    assert describe_code(255) == "exit code 255"
    assert describe_code(2) == "exit code 2"


def test_a_month_of_crashes_is_outlived_where_each_time_a_checkpoint_came_first() -> None:
    restarts = Restarts(1, 5.0)
    assert [restarts.wait_after_crash(10 * day) for day in range(1, 31)] == [5.0] * 30


def test_after_lost_checkpoints_progress_counts_from_where_the_run_went_back_to() -> None:
    restarts = Restarts(2, 5.0, reached=900)
    assert restarts.wait_after_crash(900) == 5
    # Damaged ones were set aside: that is no progress.
    assert restarts.wait_after_crash(100) == 10
    assert [restarts.wait_after_crash(step) for step in (110, 110, 120, 130)] == [5, 10, 5, 5]
    assert [restarts.wait_after_crash(130) for _ in range(2)] == [10, None]


@given(st.integers(0, 4), st.lists(st.integers(0, 6), min_size=1, max_size=6))
def test_checkpoints_that_come_and_go_do_not_keep_it_at_work_for_ever(
    limit: int, steps: list[int]
) -> None:
    restarts = Restarts(limit, 5.0)
    # Each step is newly reached or, after a loss, again: at most 7 of them, limit + 1 times.
    most = (limit + 1) * 7 * (limit + 2) * len(steps)
    assert any(restarts.wait_after_crash(step) is None for step in steps * most)

"""Who is blamed for a stall: properties over made-up heartbeats."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from pipeline.guards.heartbeat import Beat
from pipeline.guards.stalls import compare, culprits, patience, sentence, speaker


def beat(rank: int, step: int = 4, laps: int = 2, time: float = 1.0, **changes: Any) -> Beat:
    """What rank `rank` said at `time`."""
    told = {
        "world_size": 9,
        "launch": "1",
        "host": "h",
        "pid": 100 + rank,
        "created": 0.0,
        "attempt": 1,
        "phase": "data",
        "since": 0.0,
        **changes,
    }
    return Beat(rank=rank, step=step, laps=laps, time=time, **told)


places = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)), min_size=2, max_size=9)


@given(places)
def test_those_behind_hold_up_the_others(reached: list[tuple[int, int]]) -> None:
    first = [beat(rank, *place, time=1) for rank, place in enumerate(reached)]
    second = [beat(rank, *place, time=2) for rank, place in enumerate(reached)]
    seen = compare(first, second)
    found = {one.beat.rank for one in culprits(seen)}
    if len(set(reached)) == 1:
        assert found == set()
        assert speaker(seen, []) == 0
    else:
        assert found == {rank for rank, place in enumerate(reached) if place == min(reached)}
        # They can speak, and each knows its own stack.
        assert speaker(seen, culprits(seen)) == min(found)


@given(places, st.data())
def test_silence_explains_a_stall_whatever_the_phases(
    reached: list[tuple[int, int]], data: st.DataObject
) -> None:
    ranks = range(len(reached))
    mute = data.draw(st.sets(st.sampled_from(ranks), min_size=1, max_size=len(reached) - 1))
    first = [beat(rank, *reached[rank], time=1) for rank in ranks]
    second = [beat(rank, *reached[rank], time=1 if rank in mute else 2) for rank in ranks]
    seen = compare(first, second)
    found = culprits(seen)
    assert {one.beat.rank for one in found} == mute
    teller = speaker(seen, found)
    assert teller == min(set(ranks) - mute)
    told = sentence(found, seen, 30, ["" for _ in found])
    assert all(f"rank {rank} (host h, pid {100 + rank})" in told for rank in mute)
    assert "phase data of step" in told


@given(st.sets(st.integers(0, 8), max_size=9))
def test_at_the_same_place_all_wait_for_those_that_do_not_wait(busy: set[int]) -> None:
    seen = compare([], [beat(rank, waits=rank not in busy) for rank in range(9)])
    found = {one.beat.rank for one in culprits(seen)}
    assert found == (busy if len(busy) < 9 else set())


def test_where_no_beat_arrives_at_all_silence_says_nothing() -> None:
    beats = [beat(0, laps=3), beat(1, laps=2)]
    assert [one.beat.rank for one in culprits(compare(beats, beats))] == [1]


def test_a_rank_that_said_good_bye_is_not_silent() -> None:
    ended = beat(1, phase="ended", laps=1)
    seen = compare([beat(0, time=1), ended], [beat(0, time=2), ended])
    assert [one.beat.rank for one in culprits(seen)] == [1]
    assert speaker(seen, []) == 0


def test_alone_a_rank_names_itself() -> None:
    seen = compare([], [beat(0)])
    assert [one.beat.rank for one in culprits(seen)] == [0]
    assert speaker(seen, culprits(seen)) == 0
    told = sentence(culprits(seen), seen, 30, ["at pipeline/sources.py:1 in share"])
    assert told.endswith("(at pipeline/sources.py:1 in share); this has lasted 30 s")


def test_long_phases_and_a_first_step_are_given_time() -> None:
    assert patience(300, "backward", is_first_step=False) == 300
    assert patience(300, "backward", is_first_step=True) == 1800
    assert patience(300, "save", is_first_step=False) == 1800
    assert patience(300, "evaluate", is_first_step=False) == 1800
    assert patience(2, "start", is_first_step=False) == 60

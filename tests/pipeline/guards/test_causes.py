"""What collectives say when another rank is gone becomes one line; other errors stay."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest

from pipeline.guards import causes
from pipeline.guards.causes import cause_of
from pipeline.guards.heartbeat import Heart, beat_file

LOST = "n1 (rank 1) no longer answers n0 (rank 0): killed, frozen, or cut off the network"


@pytest.mark.parametrize(
    "message",
    [
        # As seen on gloo, when the cable between two hosts was cut or the other process killed.
        "[/third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 8000ms for "
        "recv operation to complete",
        "Application timeout caused pair closure",
        "[enforce fail at /gloo/transport/tcp/pair.cc:535] Connection reset by peer",
        "Gloo connectFullMesh failed with [/gloo/transport/tcp/pair.cc:144] no error",
    ],
)
def test_who_is_cut_off_is_asked_over_the_network(message: str) -> None:
    known = cause_of(RuntimeError(f"{message}\nmore"), Heart(), lambda: (LOST, 3))
    assert known is not None
    assert str(known).startswith(LOST)
    assert message[-30:] in str(known)
    assert "\n" not in str(known)
    assert (known.exit_code, known.told_by) == (1, 3)


def test_where_all_answer_the_traceback_says_more_but_of_a_network_between_them() -> None:
    timed_out = RuntimeError("Timed out waiting 8000ms for recv operation to complete")
    assert cause_of(timed_out, Heart(), lambda: ("", 0)) is None
    mesh = RuntimeError("Gloo connectFullMesh failed with [/gloo/transport/tcp/pair.cc:152] timed")
    known = cause_of(mesh, Heart(), lambda: ("", 0))
    assert known is not None
    assert "gloo cannot connect them with each other (GLOO_SOCKET_IFNAME=" in str(known)


@pytest.mark.parametrize(("number", "is_known"), [(28, True), (30, True), (122, True), (13, False)])
def test_a_full_disk_is_one_line_that_names_the_file(number: int, is_known: bool) -> None:
    known = cause_of(OSError(number, os.strerror(number), "/runs/a/preflight.json"), Heart(rank=3))
    assert (known is not None) == is_known
    if known is not None:
        assert (known.exit_code, known.told_by) == (2, 3)
        assert f"preflight.json: cannot be written ({os.strerror(number)}); make" in str(known)


def test_an_error_that_no_other_rank_makes_is_left_alone() -> None:
    for error in (RuntimeError("shape '[2]' is invalid"), ValueError("gloo")):
        assert cause_of(error, Heart(), lambda: (LOST, 0)) is None


TIMED_OUT = RuntimeError("Timed out waiting 8000ms for recv operation to complete")


@pytest.fixture
def heart(tmp_path: Path) -> Heart:
    """Rank 0 of two, which waits in the vote of step 4."""
    heart = Heart(0, 2)
    heart.beat_into(tmp_path, "one")
    heart.begin_step(3, "data")
    heart.begin("vote")
    heart.interval = 0.001
    return heart


def other(heart: Heart, moment: float, **changes: Any) -> None:
    """Rank 1, whose process is this one, writes at `moment` that it is behind."""
    assert heart.folder is not None
    told = {"rank": 1, "step": 2, "laps": 5, "phase": "save", "time": moment, **changes}
    beat = dataclasses.replace(heart.current(), **told)
    beat_file(heart.folder, 1).write_text(json.dumps(dataclasses.asdict(beat)))


@pytest.mark.parametrize(
    ("later", "changes", "part"),
    [
        (2.0, {}, "stands still in phase save of step 3 (its process is running); the others"),
        # At the same place, but not in a collective.
        (2.0, {"step": 3, "laps": 1, "phase": "vote"}, "stands still in phase vote of step 4"),
        (1.0, {}, "gives no sign of life since phase save of step 3"),
        # It ended meanwhile: what it says itself counts.
        (2.0, {"phase": "failed", "error": "bad"}, "failed in step 3: bad; the same command"),
    ],
)
def test_the_rank_that_a_collective_waited_for_in_vain_is_named(
    later: float, changes: dict[str, Any], part: str, heart: Heart
) -> None:
    """And not the one whose collective gave up."""
    other(heart, 1.0)

    def all_answer() -> tuple[str, int]:
        other(heart, later, **changes)
        return "", 0

    known = cause_of(TIMED_OUT, heart, all_answer)
    assert known is not None
    assert str(known).startswith("rank 1 (host ")
    assert part in str(known)
    assert (known.exit_code, known.told_by) == (1, 1 if "failed" in part else 0)


def test_where_all_wait_at_one_place_nobody_is_blamed_but_the_network(heart: Heart) -> None:
    other(heart, 1.0)

    def cut(moment: float, told: str) -> tuple[str, int]:
        other(heart, moment, step=3, laps=1, phase="vote", waits=True)
        return told, 0

    known = cause_of(TIMED_OUT, heart, lambda: cut(2.0, LOST))
    assert str(known).startswith(LOST)
    assert cause_of(TIMED_OUT, heart, lambda: cut(3.0, "")) is None


def test_a_host_elsewhere_that_is_cut_off_is_not_said_to_be_slow(
    heart: Heart, monkeypatch: pytest.MonkeyPatch
) -> None:
    moments = iter((1.0, 2.0, 3.0))

    def beats(*_: float) -> None:
        other(heart, next(moments), host="n1")

    beats()
    monkeypatch.setattr(causes.time, "sleep", beats)
    assert str(cause_of(TIMED_OUT, heart, lambda: (LOST, 0))).startswith(LOST)


def test_two_sides_of_a_cut_link_tell_of_each_other(heart: Heart) -> None:
    """Not of what the other said, which gave up a moment before."""
    other(heart, 1.0)

    def cut() -> tuple[str, int]:
        other(heart, 2.0, phase="failed", error="n0 (rank 0) no longer answers n1 (rank 1)")
        return LOST, 0

    assert str(cause_of(TIMED_OUT, heart, cut)).startswith(LOST)

"""What collectives say when another rank is gone becomes one line; other errors stay."""

from __future__ import annotations

import os

import pytest

from pipeline.guards.causes import cause_of
from pipeline.guards.heartbeat import Heart

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

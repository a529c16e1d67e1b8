"""Ranks that cannot meet are told so in one line of each, soon; and so is a run folder."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.agreement import Facts
from pipeline.network import free_port
from pipeline.options import AgreedError, Fault
from pipeline.rendezvous import Meeting, Place


@pytest.fixture
def taken_port() -> Iterator[int]:
    """A port where another program listens, and says nothing."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        yield other.getsockname()[1]


def test_a_run_folder_that_cannot_be_written_is_a_problem_of_rank_0(tmp_path: Path) -> None:
    meeting = Meeting(Place(0, 1, "127.0.0.1", free_port()), 5)
    try:
        with pytest.raises(AgreedError, match=r"run_dir='.*/gone': No such file or directory; "):
            meeting.roll_call(Facts("n0"), tmp_path / "gone")
    finally:
        meeting.leave()


def test_a_port_that_is_taken_is_named_by_rank_0(taken_port: int) -> None:
    with pytest.raises(Fault) as told:
        Meeting(Place(0, 2, "127.0.0.1", taken_port), 60)
    text = str(told.value)
    assert text.startswith(f"MASTER_ADDR='127.0.0.1', MASTER_PORT={taken_port}: ")
    assert "cannot listen there (" in text
    assert text.endswith("; give the launcher another --master_port")
    assert "\n" not in text


def test_another_rank_does_not_wait_for_ever_for_a_program_that_says_nothing(
    taken_port: int,
) -> None:
    began = time.monotonic()
    with pytest.raises(
        Fault, match=r"rank 0 did not answer .* \(rank 1\) within start_timeout=1 s"
    ):
        Meeting(Place(1, 2, "127.0.0.1", taken_port), 1)
    assert time.monotonic() - began < 30

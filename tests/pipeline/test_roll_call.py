"""A run folder that cannot be written as the nodes meet is told to all, not a traceback of one."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.agreement import Facts
from pipeline.network import free_port
from pipeline.options import AgreedError
from pipeline.rendezvous import Meeting, Place


def test_a_run_folder_that_cannot_be_written_is_a_problem_of_rank_0(tmp_path: Path) -> None:
    meeting = Meeting(Place(0, 1, "127.0.0.1", free_port()), 5)
    try:
        with pytest.raises(AgreedError, match=r"run_dir='.*/gone': No such file or directory; "):
            meeting.roll_call(Facts("n0"), tmp_path / "gone")
    finally:
        meeting.leave()

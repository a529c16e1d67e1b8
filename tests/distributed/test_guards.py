"""What goes wrong on one rank, on forked ranks: who is named, and how soon all are gone."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import struct
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipeline.checkpointing.folder import list_steps
from pipeline.guards.heartbeat import read_beats
from tests.distributed.entry import flags
from tests.distributed.harness import run_ranks

pytestmark = pytest.mark.distributed


def words(asked: dict[str, Any]) -> list[str]:
    """The command line of `asked`."""
    return [f"--{key}={value}" for key, value in asked.items()]


def disturbed(argv: list[str], harm: str, phase: str, rank: int, step: int) -> None:
    """Train, and do `harm` on one rank in the first `phase` of step `step` (from 0)."""
    from pipeline import pretrain, trainer
    from pipeline.assemble import run_stage
    from pipeline.guards import stalls

    original, done = trainer.Heart.begin, []

    def begin(self: trainer.Heart, name: str) -> None:
        original(self, name)
        now = self.current()
        if (now.step, name) == (step, phase) and not done:
            done.append(True)
            # What may take long may not in these runs, once they have begun.
            stalls.LONGER, stalls.AT_LEAST = 1, 0.0
            if self.rank == rank:
                HARMS[harm]()

    def begin_step(self: trainer.Heart, number: int, name: str) -> None:
        first(self, number, name)
        begin(self, name)

    first = trainer.Heart.begin_step
    trainer.Heart.begin, trainer.Heart.begin_step = begin, begin_step  # type: ignore[method-assign]
    sys.argv = ["pipeline/pretrain.py", *argv]
    run_stage(pretrain.STAGE)


def freeze() -> None:
    """Once a beat has told of the present phase."""
    time.sleep(1.5)
    os.kill(os.getpid(), signal.SIGSTOP)


def cut_links() -> None:
    """What arrives at this process's connections is dropped, unanswered, as where a cable is cut.

    By a kernel's filter that lets no byte of any packet through; there are no new ones either.
    """
    from pipeline import rendezvous

    def unreachable(*_: Any) -> Any:
        raise TimeoutError

    program = ctypes.create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, 0))  # return 0
    code = struct.pack("HP", 1, ctypes.addressof(program))
    for link in psutil.Process().net_connections("tcp"):
        if link.status in ("ESTABLISHED", "LISTEN"):
            with socket.socket(fileno=os.dup(link.fd)) as handle:
                handle.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, code)
    rendezvous.socket.create_connection = unreachable


SO_ATTACH_FILTER = 26  # of Linux
HARMS = {
    "cut": cut_links,
    "freeze": freeze,
    "die": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "sleep": lambda: time.sleep(600),
    "starve": lambda: bytearray(2**60),
}


FROZEN = "gives no sign of life since phase {} of step 3 (its process is stopped)"
SLEEPS = "stands still in phase {} of step 3 (at tests/distributed/test_guards.py"


@pytest.mark.parametrize(
    ("harm", "phase", "told"),
    [
        ("freeze", "save", FROZEN),
        ("die", "forward", "is gone; it was last seen in phase"),
        # More than any address space has.
        ("starve", "forward", "out of memory in phase {} of step 3: the process held"),
        *[
            pytest.param(harm, phase, told, marks=pytest.mark.soak)
            for phase in ("data", "forward", "save", "evaluate")
            for harm, told in (("freeze", FROZEN), ("sleep", SLEEPS))
            if (harm, phase) != ("freeze", "save")
        ],
    ],
)
def test_a_rank_that_stalls_or_dies_ends_all_and_is_named(
    harm: str, phase: str, told: str, shards_dir: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    started = time.monotonic()
    asked = words(flags(run, shards_dir, stall_timeout=3, eval_every=1))
    with pytest.raises(AssertionError):
        run_ranks(disturbed, 2, asked, harm, phase, 1, 2)
    beats = read_beats(run / "heartbeat")
    # A rank that lives can speak for itself; the others speak for one that cannot.
    teller = beats[1 if harm in ("sleep", "starve") else 0]
    assert teller.phase == "failed"
    assert f"rank 1 (host {beats[1].host}, pid {beats[1].pid})" in teller.error
    assert told.format(phase) in teller.error
    if harm == "sleep":
        stack = (run / "heartbeat" / "rank-00001.stack").read_text()
        assert "<lambda>" in stack
        assert "_advance" in stack
    # Most of it is the start; collectives alone would have waited for ten minutes.
    assert time.monotonic() - started < 100
    assert not (run / "FINISHED").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="a filter of Linux's sockets")
@pytest.mark.soak
def test_a_cut_link_ends_all_in_time_and_who_is_cut_off_is_named(
    shards_dir: Path, tmp_path: Path
) -> None:
    """Both ranks live and beat into one folder, and nothing says that the connections are gone."""
    run = tmp_path / "run"
    asked = words(flags(run, shards_dir, stall_timeout=4, steps=1000))
    started = time.monotonic()
    with pytest.raises(AssertionError):
        run_ranks(disturbed, 2, asked, "cut", "forward", 1, 2)
    assert time.monotonic() - started < 60
    host = socket.gethostname()
    told = [beat.error for beat in read_beats(run / "heartbeat") if beat.error]
    one, other = f"{host} (rank 0)", f"{host} (rank 1)"
    cut = (f"{one} no longer answers {other}: ", f"{other} no longer answers {one}: ")
    assert told
    assert all(any(part in line for part in cut) for line in told)


@pytest.mark.soak
@pytest.mark.parametrize(
    ("harm", "told"),
    [
        ("sleep", "stands still in phase save of step 3 (its process is sleeping)"),
        ("freeze", FROZEN),
    ],
)
def test_where_the_collective_gives_up_first_the_late_rank_is_named_all_the_same(
    harm: str, told: str, shards_dir: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    asked = words(flags(run, shards_dir, stall_timeout=0, collective_timeout=20))
    with pytest.raises(AssertionError, match="Fault: rank 1"):
        run_ranks(disturbed, 2, asked, harm, "save", 1, 2)
    beats = read_beats(run / "heartbeat")
    assert beats[0].error.startswith(f"rank 1 (host {beats[1].host}, pid {beats[1].pid}) ")
    assert told.format("save") in beats[0].error


def asked_by_a_file(argv: list[str], folder: Path) -> object:
    """Train until the file STOP, left in step 5, stops it; the exit code."""
    from pipeline import pretrain, trainer
    from pipeline.assemble import run_stage

    original = trainer.Heart.begin_step

    def begin_step(self: trainer.Heart, step: int, name: str) -> None:
        original(self, step, name)
        if (self.rank, step) == (1, 5):
            (folder / "STOP").touch()

    trainer.Heart.begin_step = begin_step  # type: ignore[method-assign]
    sys.argv = ["pipeline/pretrain.py", *argv]
    try:
        run_stage(pretrain.STAGE)
    except SystemExit as end:
        return end.code
    return None


@pytest.mark.soak
def test_a_file_in_its_folder_stops_a_run_after_a_save(shards_dir: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "STOP").touch()  # of an earlier attempt
    asked = words(flags(run, shards_dir, steps=100_000))
    assert run_ranks(asked_by_a_file, 2, asked, run) == [130, 130]
    assert not (run / "STOP").exists()
    assert not (run / "FINISHED").exists()
    assert list_steps(run / "checkpoints")[0] >= 5

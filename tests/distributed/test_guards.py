"""What goes wrong on one rank, on forked ranks: who is named, and how soon all are gone."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.guards.heartbeat import read_beats
from tests.distributed.entry import flags
from tests.distributed.harness import run_ranks

pytestmark = pytest.mark.distributed


def words(asked: dict[str, Any]) -> list[str]:
    """The command line of `asked`."""
    return [f"--{key}={value}" for key, value in asked.items()]


def disturbed(argv: list[str], harm: str, rank: int, step: int) -> None:
    """Train, and do `harm` on one rank when it is to go back in step `step` (from 0)."""
    from pipeline import pretrain, trainer
    from pipeline.assemble import run_stage

    original = trainer.Trainer._backward

    def harmed(self: trainer.Trainer, *args: Any) -> Any:
        if (self.world.rank, self.step) == (rank, step):
            HARMS[harm]()
        return original(self, *args)

    trainer.Trainer._backward = harmed  # type: ignore[method-assign]
    sys.argv = ["pipeline/pretrain.py", *argv]
    run_stage(pretrain.STAGE)


def freeze() -> None:
    """Once a beat has told of the present phase."""
    time.sleep(1.5)
    os.kill(os.getpid(), signal.SIGSTOP)


HARMS = {
    "freeze": freeze,
    "die": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "sleep": lambda: time.sleep(600),
    "starve": lambda: bytearray(2**60),
}


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        ("freeze", "gives no sign of life since phase forward of step 3 (its process is stopped)"),
        pytest.param(
            "sleep",
            "stands still in phase forward of step 3 (at tests/distributed/test_guards.py",
            marks=pytest.mark.soak,
        ),
        ("die", "is gone; it was last seen in phase"),
        # More than any address space has.
        ("starve", "out of memory in phase forward of step 3: the process held"),
    ],
)
def test_a_rank_that_stalls_or_dies_ends_all_and_is_named(
    harm: str, told: str, shards_dir: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    started = time.monotonic()
    with pytest.raises(AssertionError):
        run_ranks(disturbed, 2, words(flags(run, shards_dir, stall_timeout=3)), harm, 1, 2)
    beats = read_beats(run / "heartbeat")
    # A rank that lives can speak for itself; the others speak for one that cannot.
    teller = beats[1 if harm in ("sleep", "starve") else 0]
    assert teller.phase == "failed"
    assert f"rank 1 (host {beats[1].host}, pid {beats[1].pid})" in teller.error
    assert told in teller.error
    if harm == "sleep":
        stack = (run / "heartbeat" / "rank-00001.stack").read_text()
        assert "<lambda>" in stack
        assert "_train_step" in stack
    # Most of it is the start; collectives alone would have waited for ten minutes.
    assert time.monotonic() - started < 100
    assert not (run / "FINISHED").exists()

"""Harm under DeepSpeed's own launcher: who is named, what is saved, and that nobody is left."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipeline.checkpointing.folder import list_steps
from pipeline.guards.heartbeat import read_beats
from tests.distributed.entry import flags, records
from tests.distributed.test_launch import finish, launch, wait_for_step

pytestmark = [pytest.mark.soak, pytest.mark.distributed]


@pytest.fixture
def launched() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Launches runs of which nothing is left behind, whatever becomes of the test."""
    begun: list[subprocess.Popen[str]] = []

    def start(asked: dict[str, Any]) -> subprocess.Popen[str]:
        begun.append(launch("pretrain", asked))
        return begun[-1]

    yield start
    for process in begun:
        # Its ranks may have outlived it: they are in the session that it began.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def gone(processes: list[psutil.Process], seconds: float) -> bool:
    """Whether all have ended within `seconds`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        left = [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
        if not left:
            return True
        time.sleep(0.1)
    return False


def test_a_frozen_rank_is_named_and_everything_ends_in_the_stated_time(
    launched: Callable[..., subprocess.Popen[str]], shards_dir: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    asked = flags(run, shards_dir, steps=5000, stall_timeout=10)
    process = launched(asked)
    wait_for_step(run, 20)
    family = psutil.Process(process.pid).children(recursive=True)
    victim = read_beats(run / "heartbeat")[1]
    psutil.Process(victim.pid).send_signal(signal.SIGSTOP)
    started = time.monotonic()
    code, output = finish(process)
    # The time-out, a beat to notice, and what the launcher takes to look and to end.
    assert time.monotonic() - started < 10 + 20
    assert code != 0
    assert f"error: rank 1 (host {victim.host}, pid {victim.pid}) gives no sign of life" in output
    assert "Traceback" not in output
    assert gone(family, 10)


@pytest.mark.parametrize("which", ["launch.py", "deepspeed"])
def test_without_their_launcher_ranks_save_and_leave(
    which: str,
    launched: Callable[..., subprocess.Popen[str]],
    shards_dir: Path,
    tmp_path: Path,
) -> None:
    """What was saved goes on bit for bit: that is tested where a signal stops a run."""
    run = tmp_path / "run"
    process = launched(flags(run, shards_dir, steps=20_000))
    wait_for_step(run, 20)
    runner = psutil.Process(process.pid)
    family = runner.children(recursive=True)
    rank = psutil.Process(read_beats(run / "heartbeat")[1].pid)
    (runner if which == "deepspeed" else rank.parent() or rank).kill()
    assert gone(family, 60)
    process.communicate(timeout=30)
    # They agreed on a step, and saved it whole.
    assert list_steps(run / "checkpoints") == [len(records(run, "metrics.jsonl"))]
    assert not (run / "FINISHED").exists()

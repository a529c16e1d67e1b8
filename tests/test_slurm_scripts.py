"""The Slurm scripts as text; tests/soak/test_requeue.py runs them on a real one."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

SCRIPTS = sorted((Path(__file__).resolve().parent.parent / "docker" / "slurm").glob("*.sbatch"))


def test_each_asks_for_a_signal_and_to_be_requeued() -> None:
    assert [script.stem for script in SCRIPTS] == ["many_nodes", "single_node"]
    for script in SCRIPTS:
        lines = script.read_text(encoding="utf-8").splitlines()
        # Slurm reads directives up to the first command.
        first = next(n for n, line in enumerate(lines) if line and not line.startswith("#"))
        assert {"#SBATCH --signal=B:USR1@300", "#SBATCH --requeue"} <= set(lines[:first])


def test_shellcheck_finds_nothing() -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("no shellcheck on the PATH")
    subprocess.run(["shellcheck", *SCRIPTS], check=True)


# In the place of Slurm's commands and isoflop's; the first tells the script's process of a signal
# before anything is started, where it is asked to.
STUBS = {
    "scontrol": """
        if [ "$1" = requeue ]; then echo "$2" >>"$STUB/requeued"; exit; fi
        if [ -e "$STUB/early" ]; then kill -USR1 "$PPID"; fi
        echo node1""",
    "isoflop": """
        saved="$STUB/run/checkpoints/step_$(date +%s%N)"
        trap 'if [ -e "$STUB/saves" ]; then mkdir -p "$saved"; fi; exit 130' TERM
        touch "$STUB/started"
        for _ in $(seq 100); do sleep 0.1; done""",
}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with those commands."""
    for name, body in STUBS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    return tmp_path


def preempted(script: Path, place: Path, settings: dict[str, str]) -> str:
    """What the script says when Slurm asks it to make room once it has started."""
    (place / "started").unlink(missing_ok=True)
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node1", "STUB": str(place)}
    process = subprocess.Popen(
        ["bash", script, place / "run", place / "run.yaml"],
        env={**os.environ, **slurm, "PATH": f"{place}:{os.environ['PATH']}", **settings},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.monotonic() + 20
    while not (place / "early").exists() and not (place / "started").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    if not (place / "early").exists():
        process.send_signal(signal.SIGUSR1)
    return process.communicate(timeout=20)[0]


def requeues(place: Path) -> int:
    """How often Slurm was asked to start the job again."""
    file = place / "requeued"
    return len(file.read_text().split()) if file.exists() else 0


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_job_that_never_gets_to_a_checkpoint_is_not_requeued_for_ever(
    script: Path, place: Path
) -> None:
    settings = {"MAX_REQUEUES": "1"}
    preempted(script, place, settings)
    assert requeues(place) == 1
    settings["SLURM_RESTART_COUNT"] = "1"
    said = preempted(script, place, settings)
    assert requeues(place) == 1
    assert "2 starts in a row brought no new checkpoint" in said
    # One that saves may be preempted as often as it likes.
    (place / "saves").touch()
    for number in (2, 3):
        preempted(script, place, settings)
        assert requeues(place) == number


def test_a_signal_before_anything_was_started_requeues_too(place: Path) -> None:
    (place / "early").touch()
    script = next(script for script in SCRIPTS if script.stem == "many_nodes")
    assert "requeued" in preempted(script, place, {})
    assert requeues(place) == 1

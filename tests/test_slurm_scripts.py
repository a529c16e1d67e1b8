"""The Slurm scripts as text; tests/soak/test_requeue.py runs them on a real one."""

from __future__ import annotations

import shutil
import subprocess
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

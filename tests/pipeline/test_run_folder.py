"""The run folder: torn lines, locks, attempts, numbers that are none."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.atomic import write_atomically
from pipeline.options import UserError
from pipeline.run_folder import RunFolder


def test_a_torn_last_line_is_cut_and_nothing_else(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for step in (1, 2):
        folder.append("metrics.jsonl", {"step": step, "attempt": 1})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "atte')
    folder.cut_torn_lines()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]
    assert folder.last_attempt() == 1


def test_what_is_not_finite_is_null_and_the_line_stays_json(tmp_path: Path) -> None:
    RunFolder(tmp_path).append("metrics.jsonl", {"loss": float("nan"), "norm": float("inf")})
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"loss": None, "norm": None}


def test_two_processes_cannot_train_one_run_and_a_killed_one_leaves_no_lock(
    tmp_path: Path,
) -> None:
    code = (
        "import sys, time; from pipeline.run_folder import RunFolder;"
        "RunFolder(sys.argv[1]).lock(); print('locked', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(UserError, match=f"process {other.pid} on .* is working on it"):
            RunFolder(tmp_path).lock()
    finally:
        other.kill()
        other.wait()
    RunFolder(tmp_path).lock()


def test_a_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no config\.json; give a run folder"):
        RunFolder(tmp_path).read_config()


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    file = tmp_path / "state.json"
    write_atomically(file, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(file, "new \udcff")
    assert file.read_text() == "old"

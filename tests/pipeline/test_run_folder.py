"""The run folder: torn lines, locks, attempts, numbers that are none."""

from __future__ import annotations

import fcntl
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from pipeline.atomic import write_atomically
from pipeline.options import Fault, UserError
from pipeline.run_folder import RunFolder

SETTINGS = {"checkpoint_every": 4, "keep_every": 0, "log_spaced_checkpoints": 0}


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
        with pytest.raises(Fault, match=f"process {other.pid} on .* is working on it"):
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


def test_a_lost_checkpoint_is_never_a_silent_start_from_scratch(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.refuse_lost_checkpoints(SETTINGS)  # nothing was begun
    folder.append("metrics.jsonl", {"step": 3, "attempt": 1})
    folder.refuse_lost_checkpoints(SETTINGS)  # stopped before its first checkpoint
    folder.append("checkpoints.jsonl", {"step": 2, "attempt": 1, "event": "saved"})
    with pytest.raises(UserError, match=r"one at step 2 and none is there.*--restart"):
        folder.refuse_lost_checkpoints(SETTINGS)
    whole = tmp_path / "checkpoints" / "step_2" / "COMPLETE.json"
    write_atomically(whole, "{}")
    folder.refuse_lost_checkpoints(SETTINGS)
    whole.unlink()
    folder.append("checkpoints.jsonl", {"event": "restarted", "attempt": 2})
    folder.refuse_lost_checkpoints(SETTINGS)


def test_training_past_the_first_checkpoints_step_without_one_is_refused(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.write_config({"run": SETTINGS, "data": {}, "model": {}})
    for step in (1, 2, 3):
        folder.append("metrics.jsonl", {"step": step, "attempt": 1})
    folder.refuse_lost_checkpoints(SETTINGS)
    folder.append("metrics.jsonl", {"step": 4, "attempt": 1})
    with pytest.raises(UserError, match=r"goes to step 4, a checkpoint was due at step 4.*restart"):
        folder.refuse_lost_checkpoints(SETTINGS)
    # A kill before that save leaves its folder, one in the middle what it had begun.
    (tmp_path / "checkpoints").mkdir()
    folder.refuse_lost_checkpoints(SETTINGS)
    folder.append("metrics.jsonl", {"step": 5, "attempt": 1})
    with pytest.raises(UserError, match="goes to step 5"):
        folder.refuse_lost_checkpoints(SETTINGS)
    (tmp_path / "checkpoints" / ".step_4.partial").mkdir()
    folder.refuse_lost_checkpoints(SETTINGS)
    shutil.rmtree(tmp_path / "checkpoints")
    # A save that failed is written down.
    folder.append("checkpoints.jsonl", {"step": 4, "attempt": 1, "event": "failed"})
    folder.refuse_lost_checkpoints(SETTINGS)
    (tmp_path / "checkpoints.jsonl").unlink()
    folder.append("checkpoints.jsonl", {"event": "restarted", "attempt": 2})
    folder.refuse_lost_checkpoints(SETTINGS)
    for step in (1, 2, 3, 4):
        folder.append("metrics.jsonl", {"step": step, "attempt": 3})
    with pytest.raises(UserError, match="goes to step 4"):
        folder.refuse_lost_checkpoints(SETTINGS)


@pytest.mark.parametrize("left", ["metrics.jsonl", "ledger.jsonl", "eval.jsonl"])
def test_any_record_of_steps_tells_that_checkpoints_are_lost(left: str, tmp_path: Path) -> None:
    """Where all else is gone, config.json too: what is asked now says when one was due."""
    folder = RunFolder(tmp_path)
    for step in (0, 3):
        folder.append(left, {"step": step, "attempt": 2})
        folder.refuse_lost_checkpoints(SETTINGS)
    for event in ("discarded", "skipped"):
        folder.append("ledger.jsonl", {"step": 4, "attempt": 2, "event": event})
        folder.refuse_lost_checkpoints(SETTINGS)
    folder.append(left, {"step": 5, "attempt": 2})
    with pytest.raises(UserError, match=f"{left} goes to step 5, a checkpoint was due at step 4"):
        folder.refuse_lost_checkpoints(SETTINGS)
    folder.refuse_lost_checkpoints({**SETTINGS, "checkpoint_every": 0})
    # What it was told then counts where it is known.
    folder.write_config({"run": {**SETTINGS, "checkpoint_every": 9}, "data": {}, "model": {}})
    folder.refuse_lost_checkpoints(SETTINGS)


def test_a_save_that_skipped_steps_put_off_is_not_missed_before_its_time(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.checkpoints.mkdir()
    for step, skipped in ((3, False), (4, True), (5, False)):
        folder.append("metrics.jsonl", {"step": step, "attempt": 1, "skipped": skipped})
        folder.refuse_lost_checkpoints(SETTINGS)
    folder.append("metrics.jsonl", {"step": 6, "attempt": 1, "skipped": False})
    with pytest.raises(UserError, match="a checkpoint was due at step 4"):
        folder.refuse_lost_checkpoints(SETTINGS)


def test_a_stop_that_meant_an_earlier_attempt_is_forgotten(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.forget_stop()
    assert not folder.stop_file.exists()
    folder.stop_file.touch()
    folder.forget_stop()
    assert not folder.stop_file.exists()


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot be written .*; make room there"):
        RunFolder(tmp_path / "gone").append("metrics.jsonl", {"step": 1})


def test_a_line_waits_for_room_whole_and_in_its_order(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    folder = RunFolder(tmp_path)
    folder.note("metrics.jsonl", {"step": 1})
    size = (tmp_path / "metrics.jsonl").stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 5, before[1]))  # room for half a line
    try:
        for step in (2, 3):
            folder.note("metrics.jsonl", {"step": step})
        assert "File too large" in folder.write_held()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (tmp_path / "metrics.jsonl").stat().st_size == size
    assert capsys.readouterr().out.count("cannot be written") == 1
    folder.note("metrics.jsonl", {"step": 4})
    assert folder.write_held() == ""
    assert [line["step"] for line in folder.lines("metrics.jsonl")] == [1, 2, 3, 4]


def test_the_last_score_of_a_step_counts(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for step, name, loss in ((2, "a", 3.0), (2, "b", 9.0), (2, "a", 2.0), (4, "a", float("nan"))):
        folder.append("eval.jsonl", {"step": step, "eval_set": name, "loss": loss})
    assert folder.evaluation_losses("a", up_to=4) == {2: 2.0}


def test_scores_after_the_step_gone_on_from_do_not_count(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for step in (0, 2, 4):
        folder.append("eval.jsonl", {"step": step, "eval_set": "a", "loss": 1.0 / (step + 1)})
    assert folder.evaluations(up_to=2) == {(0, "a"), (2, "a")}
    assert folder.evaluation_losses("a", up_to=3) == {0: 1.0, 2: 1 / 3}
    assert folder.evaluations(up_to=0) == {(0, "a")}


def test_an_attempt_whose_first_batch_was_discarded_is_counted(tmp_path: Path) -> None:
    """Else the next start would give its own discarded batches the same attempt."""
    folder = RunFolder(tmp_path)
    folder.append("metrics.jsonl", {"step": 4, "attempt": 1})
    folder.append("ledger.jsonl", {"step": 3, "attempt": 2, "event": "discarded"})
    assert folder.last_attempt() == 2


def test_rollbacks_are_counted_where_the_disk_is_full(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "absent")
    for made in range(3):
        assert folder.rollbacks() == made
        folder.note("checkpoints.jsonl", {"event": "rolled_back", "step": 5})
    folder.note("checkpoints.jsonl", {"event": "saved", "step": 10})
    assert folder.rollbacks() == 0


def test_who_looks_at_the_lock_keeps_nobody_out(tmp_path: Path) -> None:
    (tmp_path / ".lock").touch()
    with (tmp_path / ".lock").open() as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)
        timer = threading.Timer(0.02, fcntl.flock, (looking, fcntl.LOCK_UN))
        timer.start()
        RunFolder(tmp_path).lock()
        timer.join()
    # Held until this process ends, and by it.
    assert (tmp_path / ".lock").read_text().startswith(f"{os.getpid()} on ")


def test_a_line_that_a_lost_host_left_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1, "attempt": 1}\n\0\0\0\0\n')
    for read in (
        RunFolder(tmp_path).last_attempt,
        lambda: RunFolder(tmp_path).lines("metrics.jsonl"),
    ):
        with pytest.raises(UserError, match=r"metrics.jsonl: line 2 is no JSON object; remove"):
            read()

"""What the doctor says of made-up heartbeats, and of a rank that really stands still."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.guards import stacks
from pipeline.guards.heartbeat import Beat, Heart
from pipeline.options import UserError
from tests.pipeline.guards.test_stalls import beat
from tools import doctor
from tools.cli import dispatch

LIMITS = {"silent": 30.0, "stuck": 300.0}


def states(beats: list[Beat], **alive: bool | None) -> list[str]:
    """The state of each rank at second 1000; `r1=False` says that rank 1's process is gone."""
    lives = {each.rank: alive.get(f"r{each.rank}", True) for each in beats}
    return [found.state for found in doctor.examine(beats, lives, 1000.0, **LIMITS)]


def test_each_state_is_told_apart() -> None:
    beats = [
        beat(0, time=999, since=990),
        beat(1, time=999, since=600),
        beat(2, time=960, since=959),
        beat(3, time=999, since=990, phase="failed"),
        beat(4, time=100, since=90, phase="ended"),
        beat(5, time=999, since=990),
        beat(6, time=999, since=990),
    ]
    assert states(beats, r5=False, r6=None, r4=False) == [
        "goes_on",
        "stands_still",
        "silent",
        "failed",
        "ended",
        "gone",
        "goes_on",
    ]


def test_a_first_step_which_may_compile_is_given_the_watchdogs_time() -> None:
    beats = [
        beat(0, time=999, since=200, phase="forward", is_first_step=True),
        beat(1, time=999, since=200, phase="forward"),
    ]
    found = doctor.examine(beats, {0: True, 1: True}, 1000.0, **LIMITS, by_phase=True)
    assert [each.state for each in found] == ["goes_on", "stands_still"]


def test_who_is_behind_is_told_only_where_somebody_is() -> None:
    waits, works = beat(0, step=5, laps=0, since=0, time=9), beat(1, step=4, laps=9)
    done, lives = beat(2, step=4, laps=1, phase="ended"), {0: True, 1: True, 2: False}
    found = doctor.examine([waits, works, done], lives, 9.0, **LIMITS)
    assert [each.is_behind for each in found] == [False, True, False]
    # One that has just begun its phase waits for nobody: the beats are of different moments.
    for others in (
        [beat(0), beat(1)],
        [dataclasses.replace(waits, since=8.5), works],
        [waits, dataclasses.replace(waits, rank=1)],
    ):
        found = doctor.examine(others, lives, 9.0, **LIMITS)
        assert not any(each.is_behind for each in found)
    found = doctor.examine([beat(0), beat(1)], lives, 1.0, **LIMITS)
    assert not any(each.is_behind for each in found)


def make_run(folder: Path, **changes: Any) -> Path:
    """A run folder with what the doctor reads."""
    folder.mkdir()
    asked = {"steps": 10, "stall_timeout": 300.0, **changes}
    document = {"run": asked, "data": {}, "model": {}}
    (folder / "config.json").write_text(json.dumps(document))
    line = {"step": 4, "attempt": 1, "loss": None, "seconds": 0.1}
    (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    (folder / "checkpoints" / "step_3").mkdir(parents=True)
    (folder / "checkpoints" / "step_3" / "COMPLETE.json").write_text("{}")
    return folder


def examined(run: Path, *arguments: str) -> tuple[int, str]:
    """Exit code and what was printed."""
    done = subprocess.run(
        [sys.executable, "-m", "tools.cli", "doctor", str(run), *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        cwd=Path(__file__).parent.parent.parent,
    )
    assert done.stderr == ""
    return done.returncode, done.stdout


def test_a_run_is_examined_with_its_lock_and_its_newest_checkpoint(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    heart = Heart(1, 3)
    heart.beat_into(run / "heartbeat", "one")
    with (run / ".lock").open("w") as lock:
        lock.write(f"{os.getpid()} on here\n")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        code, out = examined(run, "--stacks=false", "--json")
    told = json.loads(out)
    assert code == 0
    assert told["run"]["lock"] == f"process {os.getpid()} on here"
    assert told["run"]["newest_checkpoint"] == 3
    assert not told["run"]["finished"]
    assert told["run"]["last_metrics"]["step"] == 4
    (rank,) = told["ranks"]
    assert (rank["rank"], rank["alive"], rank["state"]) == (1, True, "goes_on")
    heart.close("it broke")
    code, out = examined(run, "--stacks=false")
    assert code == 1
    assert "lock: nobody on this host" in out
    assert "last step: 4 of 10, loss not finite" in out
    assert "2 of 3 ranks have no heartbeat here" in out
    assert "failed; failed of step 1" in out
    assert out.rstrip().endswith("it broke")
    # Whatever its ranks said last: it is done.
    (run / "FINISHED").touch()
    assert examined(run, "--stacks=false")[0] == 0


def test_without_heartbeats_it_says_so_and_no_run_is_a_mistake(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dispatch(["doctor", str(make_run(tmp_path / "run"))])
    assert "no heartbeats" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"holds no config\.json"):
        dispatch(["doctor", str(tmp_path)])


@pytest.mark.distributed
def test_a_rank_that_stands_still_is_shown_with_its_stack(tmp_path: Path) -> None:
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from pipeline.guards.heartbeat import Heart\n"
        "heart = Heart(0, 1)\n"
        "heart.beat_into(Path(sys.argv[1]), 'one')\n"
        "heart.start()\n"
        "def waits_for_a_disk():\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(60)\n"
        "waits_for_a_disk()\n"
    )
    run = make_run(tmp_path / "run")
    rank = subprocess.Popen(
        [sys.executable, "-c", code, str(run / "heartbeat")], stdout=subprocess.PIPE, text=True
    )
    try:
        assert rank.stdout is not None
        assert rank.stdout.readline() == "ready\n"
        time.sleep(2)
        exit_code, out = examined(run, "--stuck_after=0.5")
    finally:
        rank.kill()
        rank.communicate()
    assert exit_code == 1
    assert f"pid {rank.pid}, lives): stands still; start of step 1" in out
    if "py-spy is not installed" in out:
        assert "pip install 'isoflop[cluster]'" in out
        pytest.skip("py-spy is not installed: no stack to look for")
    assert "waits_for_a_disk" in out


def test_without_py_spy_one_line_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stacks.shutil, "which", lambda name: None)
    monkeypatch.setattr(stacks.sys, "executable", "/nowhere/python")
    stack, why = stacks.stack_of(os.getpid())
    assert stack == ""
    assert why == "no stack: py-spy is not installed; pip install 'isoflop[cluster]'"


def test_a_finding_is_as_it_was_but_for_its_stack() -> None:
    (found,) = doctor.examine([beat(0, phase="ended")], {0: False}, 1.0, **LIMITS)
    assert doctor.with_stack(found) == dataclasses.replace(found, stack="")


def test_a_long_save_is_no_standstill_unless_asked_for() -> None:
    beats = [beat(0, time=999, since=500, phase="save"), beat(1, time=999, since=500)]
    for by_phase, expected in ((True, "goes_on"), (False, "stands_still")):
        found = doctor.examine(beats, {0: True, 1: True}, 1000.0, **LIMITS, by_phase=by_phase)
        assert [each.state for each in found] == [expected, "stands_still"]


def test_ranks_that_beat_seldom_are_not_silent(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    told = dataclasses.replace(Heart(0, 4096).current(), launch="one", time=time.time() - 100)
    (run / "heartbeat").mkdir()
    (run / "heartbeat" / "rank-00000.json").write_text(json.dumps(dataclasses.asdict(told)))
    assert examined(run, "--stacks=false")[0] == 0


@pytest.mark.parametrize("broken", ['{"step": 1}', "[]", "\0\0\0", '{"loss": "x"}'])
def test_half_written_files_are_no_traceback(tmp_path: Path, broken: str) -> None:
    run = make_run(tmp_path / "run")
    heart = Heart(0, 2)
    heart.beat_into(run / "heartbeat", "one")
    told = {**dataclasses.asdict(heart.current()), "rank": None, "time": "now"}
    (run / "heartbeat" / "rank-00001.json").write_text(json.dumps(told))
    (run / "metrics.jsonl").write_text(broken + "\n")
    (run / "config.json").write_text('{"run": {"stall_timeout": "x"}, "data": {}, "model": {}}')
    code, out = examined(run, "--stacks=false")
    assert code == 0
    assert "1 of 2 ranks have no heartbeat here" in out
    assert ("line 1 is no JSON object; remove that line" in out) == (broken[0] != "{")

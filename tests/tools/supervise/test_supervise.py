"""The supervisor as a process, over an entry point that does as a plan says."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from pipeline.guards.heartbeat import Heart, beat_file, began
from pipeline.options import UserError
from tests.tools.supervise.test_launch import TOLD
from tools.cli import dispatch
from tools.supervise.lock import only_supervisor
from tools.supervise.processes import Stop, mark, processes_of

pytestmark = pytest.mark.distributed
ENTRY = """
import os, pathlib, signal, subprocess, sys, time

run = pathlib.Path([w for w in sys.argv if w.startswith("--run_dir=")][-1].partition("=")[2])
made = run / "attempts"
number = len(made.read_text()) if made.exists() else 0
made.write_text("." * (number + 1))
action = (run.parent / "plan").read_text().split()[number]
if action.startswith("save"):
    checkpoint = run / "checkpoints" / f"step_{number + 1}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "COMPLETE.json").touch()
if action == "finish":
    (run / "FINISHED").touch()
    os.kill(os.getpid(), signal.SIGKILL)
if action == "late":
    (run / ("FINISHED" if (run / "saved").exists() else "early")).touch()
if action.startswith("leave"):
    # A rank that outlives its launcher.
    deaf = "trap '' TERM; " if action == "leave_deaf" else ""
    rank = ["sh", "-c", f"{deaf}echo $$ > {run}/rank; sleep 60"]
    subprocess.Popen(rank, env={**os.environ, "RANK": "0"}, start_new_session=True)
    while not (run / "rank").exists():
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)
if action == "train":
    def save(*_):
        time.sleep(0.3)
        (run / "saved").touch()
        sys.exit(1)
    signal.signal(signal.SIGTERM, save)
    (run / "training").touch()
    time.sleep(60)
sys.exit({"mistake": 2, "stop": 130, "zero": 0}.get(action, 1))
"""

LAUNCHER = """
import pathlib, runpy, sys

here = pathlib.Path(sys.argv[0])
place = [pathlib.Path(word).name for word in sys.argv].index("pretrain.py")
with here.with_name("launched").open("a") as file:
    print(*sys.argv[1:place], file=file)
sys.argv = sys.argv[place:]
runpy.run_path(sys.argv[0])
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run's folder to be, beside the entry point and something like DeepSpeed's launcher."""
    monkeypatch.setattr("tools.supervise.world._PROBE_PAUSE", 0.0)
    (tmp_path / "pretrain.py").write_text(ENTRY)
    (tmp_path / "deepspeed").write_text(LAUNCHER)
    return tmp_path / "run"


def words(run: Path, plan: str, *flags: str, launcher: tuple[str, ...] = ()) -> list[str]:
    """What follows `isoflop` for a run that goes by the plan; `launcher` are its own flags."""
    (run.parent / "plan").write_text(plan)
    told = [word for word in TOLD if not word.startswith("--run_dir")]
    python = [sys.executable, "-I", "-S", *([f"{run.parent}/deepspeed"] if launcher else [])]
    entry = [*python, *launcher, f"{run.parent}/pretrain.py", f"--run_dir={run}"]
    return ["supervise", "--backoff=0.01", *flags, "--", *entry, *told]


def here(run: Path, plan: str, *flags: str, launcher: tuple[str, ...] = ()) -> int:
    """The exit code of `isoflop supervise` in this process."""
    try:
        dispatch(words(run, plan, *flags, launcher=launcher))
    except SystemExit as left:
        return int(str(left.code))
    return 0


def start(run: Path, plan: str, *flags: str) -> subprocess.Popen[str]:
    """`isoflop supervise`, started."""
    command = [sys.executable, "-m", "tools.cli", *words(run, plan, *flags)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and what it said."""
    _, said = process.communicate(timeout=40)
    return process.returncode, said


def is_gone(pid: int) -> bool:
    """Whether the process has ended, though maybe nobody has asked how."""
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def wait_for(file: Path) -> None:
    """Until there is such a file."""
    deadline = time.monotonic() + 20
    while not file.exists():
        assert time.monotonic() < deadline, file
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("plan", "code", "attempts", "part"),
    [
        ("crash zero finish", 0, 3, "(restart 2 of 2 without a new checkpoint)"),
        ("crash crash crash finish", 1, 3, "exit code 1, at its start, without a checkpoint; give"),
        ("crash save save save crash finish", 0, 6, "at the checkpoint of step 4; starts again"),
        ("crash mistake finish", 2, 2, "it would be refused again"),
        ("crash stop finish", 130, 2, "the same command goes on"),
    ],
)
def test_what_crashed_is_started_again_and_nothing_else(
    plan: str,
    code: int,
    attempts: int,
    part: str,
    run: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert here(run, plan, "--max_restarts=2") == code
    said = capfd.readouterr().err
    assert part in said
    assert len((run / "attempts").read_text()) == attempts
    assert all(line.startswith("supervise run: ") for line in said.splitlines())


@pytest.mark.parametrize(("action", "ending"), [("leave", ""), ("leave_deaf", "were killed")])
def test_no_process_of_an_attempt_is_left_when_the_next_begins(
    action: str, ending: str, run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert here(run, f"{action} finish", "--stop_seconds=0.3") == 0
    assert ending in capfd.readouterr().err
    assert is_gone(int((run / "rank").read_text()))


def test_what_a_killed_supervisor_left_is_ended_before_the_next_one_starts(run: Path) -> None:
    first = start(run, "train late stop")
    wait_for(run / "training")
    first.kill()
    first.wait()  # its pipe is still held by what it left
    assert len(processes_of(run)) == 1
    assert here(run, "train late stop") == 0
    assert (run / "saved").exists()
    assert not processes_of(run)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1])
def test_a_stop_is_passed_on_and_the_save_waited_for(number: signal.Signals, run: Path) -> None:
    process = start(run, "train finish")
    wait_for(run / "training")
    process.send_signal(number)
    code, said = finish(process)
    assert code == 130, said
    assert (run / "saved").exists()
    assert f"{number.name}: waits for the run to save its state" in said
    assert "starts again" not in said
    assert len((run / "attempts").read_text()) == 1


def test_isoflop_stop_and_a_second_supervisor_find_the_first(
    run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    process = start(run, "train finish")
    wait_for(run / "training")
    with pytest.raises(UserError, match=f"process {process.pid} on .* supervises it; wait for it"):
        dispatch(words(run, "train finish"))
    # Not in this process, which is the supervisor's parent and would be told its exit code.
    subprocess.run([sys.executable, "-m", "tools.cli", "stop", str(run)], check=True)
    assert finish(process)[0] == 130
    assert (run / "saved").exists()
    with pytest.raises(SystemExit):
        dispatch(["stop", str(run)])
    assert "none of its ranks is at work" in capfd.readouterr().err


def test_ranks_that_only_other_hosts_have_are_asked_by_a_file(run: Path) -> None:
    """A supervisor that was killed left its pdsh behind, which must not be signalled."""
    pdsh = run.parent / "pdsh"
    shutil.copy(str(shutil.which("sleep")), pdsh)
    run.mkdir()
    process = subprocess.Popen([str(pdsh), "60"], env=mark(run))

    def leave() -> None:
        wait_for(run / "STOP")
        process.kill()  # its ranks have left

    ranks = threading.Thread(target=leave)
    ranks.start()
    assert Stop(run).wait(20) == 0
    ranks.join()
    assert process.wait() == -signal.SIGKILL


def test_a_run_that_was_never_begun_leaves_no_folder(run: Path) -> None:
    with pytest.raises(UserError, match="cannot run it"), only_supervisor(run):
        raise UserError("cannot run it")
    assert not run.exists()


def test_a_port_that_is_taken_is_done_without(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("", 0)) as server:
        taken = str(server.getsockname()[1])
        assert here(run, "crash finish", launcher=("--quiet", "--master_port", taken)) == 0
    assert f"master_port={taken}: taken by another process; " in capfd.readouterr().err
    launched = (run.parent / "launched").read_text().splitlines()
    ports = [line.removeprefix("--quiet --master_port ") for line in launched]
    assert len(ports) == 2
    assert taken not in ports


def test_it_goes_on_without_a_host_that_does_not_answer_and_ends_without_any(
    run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    hostfile = run.parent / "hostfile"
    hostfile.write_text("n0 slots=4\nn1 slots=4\n")
    launcher = ("--hostfile", str(hostfile))
    # The first start makes the run's attempts/ and with it n1 is gone.
    (run.parent / "n0").touch()
    probe = f"sh -c 'test -e {run.parent}/{{host}} || test ! -e {run}/attempts'"
    assert here(run, "crash finish", f"--probe={probe}", launcher=launcher) == 0
    assert "n1 did not answer: 4 ranks on 1 host instead of 8 on 2" in capfd.readouterr().err
    assert (run.parent / "launched").read_text().splitlines() == [
        f"--hostfile {hostfile}",
        f"--hostfile {run}/.hostfile_left --force_multi",
    ]
    (run / "FINISHED").unlink()
    gone = here(run, "", "--probe=false", "--max_restarts=1", launcher=launcher)
    assert gone == 1
    assert "nothing is left to go on with, at its start" in capfd.readouterr().err


def beat(run: Path, process: psutil.Process) -> None:
    """The process's heartbeat, as a rank of the run."""
    Heart(0, 1).beat_into(run / "heartbeat", "by hand")
    file = beat_file(run / "heartbeat", 0)
    told = json.loads(file.read_text())
    told |= {"pid": process.pid, "created": began(process), "time": time.time()}
    file.write_text(json.dumps(told))


def test_a_run_that_somebody_started_by_hand_is_waited_for_and_not_ended(run: Path) -> None:
    rank = subprocess.Popen(["sleep", "60"])
    try:
        beat(run, psutil.Process(rank.pid))
        stop = Stop(run, since=time.time() - 5)
        beat(run, psutil.Process(rank.pid))
        assert stop.wait(5.0) == 0
        assert rank.poll() is None
        # One that came later is the attempt's own.
        came = Stop(run.with_name("other"), since=time.time())
        beat(run.with_name("other"), psutil.Process(rank.pid))
        assert [process.pid for process in came.ask()] == [rank.pid]
    finally:
        rank.kill()
        rank.wait()


def test_a_finished_run_that_is_asked_for_more_steps_is_not_taken_for_done(run: Path) -> None:
    run.mkdir()
    (run / "FINISHED").touch()
    told = {"run": {"steps": 5}, "data": {}, "model": {}}
    (run / "config.json").write_text(json.dumps(told))
    assert here(run, "") == 0
    told["run"]["steps"] = 3
    (run / "config.json").write_text(json.dumps(told))
    with pytest.raises(UserError, match=r"steps=5: the run in .* is FINISHED with 3; give"):
        here(run, "")

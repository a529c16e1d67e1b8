"""The command as processes: killed, interrupted, started twice."""

import contextlib
import os
import signal
import time
from pathlib import Path

import pytest

from pipeline.data.manifest import read_manifest
from pipeline.options import UserError
from tests.tools.tokenising import start
from tests.tools.tokenize_corpus.small import arguments, line, run
from tools.corpus_records import Running

pytestmark = pytest.mark.distributed
ROWS = 20_000
BUSY = {"task_bytes": 500_000, "shard_bytes": 10**6}


def many_rows(folder):
    """A corpus that two workers are busy with for a while."""
    (folder / "in").mkdir()
    (folder / "in/a.jsonl").write_bytes(b"".join(line(f"{i} word " * 30) for i in range(ROWS)))
    return folder / "in"


def at_work(output):
    """Process ids of the workers that say they are in a task."""
    told = map(Running.read, output.glob("tasks/running/*.running"))
    return {running.process for running in told if running is not None}


@pytest.fixture
def busy(model, tmp_path):
    """The command, its first worker held in its task; its output folder; that worker's process id.

    However slow the test is, the command cannot have ended before SIGCONT lets the worker go on.
    """
    output = tmp_path / "out"
    given = arguments(many_rows(tmp_path), model, output, **BUSY, workers=2)
    process = start(given)
    deadline = time.monotonic() + 60
    held = None
    while held is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
        worker = next(iter(at_work(output)), None)
        if worker is not None:
            os.kill(worker, signal.SIGSTOP)
            if worker in at_work(output):
                held = worker
            else:  # it was between two tasks
                os.kill(worker, signal.SIGCONT)
    yield process, output, held
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def alive_in_group(group):
    """Processes of a group that still run, after a moment's grace."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        states = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                states.append(path.read_text().rpartition(")")[2].split())
        if not (alive := [s for s in states if int(s[2]) == group and s[0] != "Z"]):
            return []
        time.sleep(0.02)
    return alive


def test_a_killed_worker_is_noticed(busy):
    process, output, worker = busy
    os.kill(worker, signal.SIGKILL)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "killed from outside" in told
    assert "Traceback" not in told
    assert not (output / "manifest.json").exists()


def test_a_command_killed_alone_leaves_no_process_and_no_lock(busy, model, tmp_path):
    process, output, worker = busy
    os.kill(process.pid, signal.SIGKILL)
    os.kill(worker, signal.SIGCONT)
    process.communicate(timeout=60)
    run(tmp_path / "in", model, output, **BUSY)
    assert sum(s.documents for s in read_manifest(output).shards) == ROWS
    assert not alive_in_group(process.pid)


def test_an_interrupt_ends_quietly_and_the_same_command_goes_on(busy, model, tmp_path):
    process, output, worker = busy
    os.killpg(process.pid, signal.SIGINT)
    os.kill(worker, signal.SIGCONT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130
    assert told == "interrupted; the same command goes on from here\n"
    assert not alive_in_group(process.pid)
    run(tmp_path / "in", model, output, **BUSY)
    assert sum(s.documents for s in read_manifest(output).shards) == ROWS


def test_a_second_command_on_the_same_folder_is_refused(busy, model, tmp_path):
    process, output, worker = busy
    with pytest.raises(UserError, match="another isoflop tokenize"):
        run(tmp_path / "in", model, output, **BUSY)
    os.kill(worker, signal.SIGCONT)
    process.communicate(timeout=60)
    assert process.returncode == 0
    run(tmp_path / "in", model, output, **BUSY)

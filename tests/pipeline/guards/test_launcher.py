"""Whether the launcher above a rank still lives, and printing where nobody reads."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import psutil
import pytest

from pipeline.guards.launcher import Launcher, Unheard, is_launcher

PYTHON = "/venv/bin/python"


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([PYTHON, "/venv/bin/deepspeed", "--num_gpus", "2", "pipeline/pretrain.py"], True),
        ([PYTHON, "-u", "-m", "deepspeed.launcher.launch", "--world_info=x", "p.py"], True),
        # It lives on when its terminal goes, as nohup asks.
        (["bash", "-c", "deepspeed pipeline/pretrain.py"], False),
        (["bash", "train.sh", "deepspeed"], False),
        ([PYTHON, "-m", "pytest"], False),
        ([], False),
    ],
)
def test_what_is_a_launcher(argv: list[str], expected: bool) -> None:
    assert is_launcher(argv) == expected


@pytest.mark.parametrize(("rank", "expected"), [("0", "True"), ("", "False")])
def test_a_rank_sees_that_its_parent_is_gone(rank: str, expected: str) -> None:
    """The parent, which started it as a rank or not, ends; nothing else is waited for."""
    child = (
        "import os, time\n"
        "from pipeline.guards.launcher import Launcher\n"
        "launcher, parent = Launcher(), os.getppid()\n"
        "before = launcher.is_gone()\n"
        "print('ready', flush=True)\n"
        "deadline = time.monotonic() + 20\n"
        "while os.getppid() == parent and time.monotonic() < deadline: time.sleep(0.01)\n"
        "print(before, launcher.is_gone(), flush=True)\n"
    )
    # It ends when its child has seen it: the first line comes to it, the second to us.
    parent = (
        "import subprocess, sys, os\n"
        f"subprocess.Popen([sys.executable, '-c', {child!r}])\n"
        "sys.stdin.readline()\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "RANK"}
    if rank:
        environment["RANK"] = rank
    process = subprocess.Popen(
        [sys.executable, "-c", parent],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.kill()
    assert process.stdout.readline() == f"False {expected}\n"
    process.wait(10)
    process.stdout.close()


@pytest.mark.parametrize(("nohup", "expected"), [("nohup", "False"), ("", "True")])
def test_a_rank_started_under_nohup_outlives_its_shell(nohup: str, expected: str) -> None:
    child = (
        "import os, time\n"
        "from pipeline.guards.launcher import Launcher\n"
        "launcher, parent = Launcher(), os.getppid()\n"
        "print('ready', flush=True)\n"
        "deadline = time.monotonic() + 20\n"
        "while os.getppid() == parent and time.monotonic() < deadline: time.sleep(0.01)\n"
        "print(launcher.is_gone(), flush=True)\n"
    )
    shell = subprocess.Popen(
        ["bash", "-c", f'RANK=0 {nohup} "$0" -c "$1" & read _', sys.executable, child],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert shell.stdout is not None
    assert shell.stdout.readline() == "ready\n"
    shell.kill()
    assert shell.stdout.readline() == f"{expected}\n"
    shell.wait(10)
    shell.stdout.close()


def test_a_launcher_that_cannot_be_looked_at_is_not_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    def hidden(process: psutil.Process) -> str:
        raise psutil.AccessDenied(process.pid)

    monkeypatch.delenv("RANK", raising=False)
    launcher = Launcher()
    launcher._above = [psutil.Process()]
    monkeypatch.setattr(psutil.Process, "status", hidden)
    assert not launcher.is_gone()


def test_without_a_launcher_nothing_is_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert not Launcher().is_gone()


def test_a_line_that_nobody_reads_is_dropped() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    stream = Unheard(os.fdopen(writer, "w"))
    deadline = time.monotonic() + 5
    for _ in range(3):
        assert time.monotonic() < deadline
        assert stream.write("a line\n") == 7
        stream.flush()
    assert not stream.isatty()

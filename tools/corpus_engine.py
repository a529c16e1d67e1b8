"""Runs tasks in processes of this machine, under datatrove's local executor.

datatrove is told nothing about what is complete: it gets the tasks that have no record.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from datatrove.executor.local import LocalPipelineExecutor
from loguru import logger

from pipeline.options import UserError
from tools.corpus_records import Running, running_folder
from tools.corpus_step import TaskStep

_ORPHAN_SECONDS = 10.0
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_WATCH_SECONDS = 0.5  # a killed worker is noticed after two of them


class WorkerDiedError(UserError):
    """A worker process was killed from outside."""


class _QuietExecutor(LocalPipelineExecutor):
    """datatrove prints its log for local rank 0 alone: call every rank another one."""

    def _run_for_rank(self, rank: int, local_rank: int = 0, node_rank: int = -1) -> Any:
        return super()._run_for_rank(rank, local_rank + 1, node_rank)


def run_locally(step: TaskStep, workers: int, watch: Callable[[], None]) -> None:
    """Run a step's tasks in `workers` processes (1: in this one).

    `watch` is called about twice a second.

    Raises:
        UserError: a worker was killed.
        OSError: the output cannot be written.
    """
    output = step.output
    wait_for_orphans(output)
    step.prepare()
    logger.disable("datatrove")
    with tempfile.TemporaryDirectory(prefix="isoflop-tokenize-") as logs:
        executor = _QuietExecutor(
            [step],
            tasks=len(step.tasks),
            workers=min(workers, len(step.tasks)),
            logging_dir=logs,
            skip_completed=False,
        )
        with _Watch(output, watch), _children_die_with_this():
            if workers > 1:
                _start_fork_server()
            executor.run()


def wait_for_orphans(output: Path) -> None:
    """Let the workers of a killed command notice that it is gone; they look once a second."""
    deadline = time.monotonic() + _ORPHAN_SECONDS
    while time.monotonic() < deadline:
        if all(map(_orphaned, running_folder(output).glob("*.running"))):
            return
        time.sleep(0.05)


def _die_with_parent() -> None:
    """In a forked child: be killed when the parent is, as nobody else would end it (Linux)."""
    if _forking and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


# datatrove's multiprocess.Manager is a fork of the command that would outlive its kill.
os.register_at_fork(after_in_child=_die_with_parent)
_forking = False


@contextmanager
def _children_die_with_this() -> Iterator[None]:
    global _forking
    _forking = True
    try:
        yield
    finally:
        _forking = False


def _start_fork_server() -> None:
    """Start the parent of all workers deaf to Ctrl-C, which reaches the whole process group.

    Its children inherit that; the command itself hears it and stops them.
    """
    from multiprocess import forkserver

    if threading.current_thread() is not threading.main_thread():
        return
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        forkserver.ensure_running()
    finally:
        signal.signal(signal.SIGINT, previous)


class _Watch:
    """A thread that shows progress and notices a killed worker, for which datatrove would wait."""

    def __init__(self, output: Path, watch: Callable[[], None]) -> None:
        self._output, self._watch = output, watch
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._in_main = threading.current_thread() is threading.main_thread()
        self._previous: Any = None

    def __enter__(self) -> None:
        if self._in_main:
            self._previous = signal.signal(signal.SIGUSR1, self._raise)
        self._thread.start()

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()
        if self._in_main:
            signal.signal(signal.SIGUSR1, self._previous)

    @staticmethod
    def _raise(number: int, frame: FrameType | None) -> None:
        raise WorkerDiedError(
            "workers: one was killed from outside (out of memory?); the same command goes on, with "
            "fewer --workers if memory was short"
        )

    def _run(self) -> None:
        suspects: set[str] = set()
        while not self._stop.wait(_WATCH_SECONDS):
            self._watch()
            running = running_folder(self._output).glob("*.running")
            gone = {path.name for path in running if _orphaned(path)}
            # Seen twice, so that a worker that is just about to tidy up is not taken for dead.
            if gone & suspects and self._in_main and not self._stop.is_set():
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)
                return
            suspects = gone


def _orphaned(running: Path) -> bool:
    """Whether the process that a `.running` file names is gone."""
    told = Running.read(running)
    return told is not None and told.is_gone()

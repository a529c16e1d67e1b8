"""The processes of a run on this host: found, asked to save and leave, ended; each by its id.

What a supervisor starts carries the run's folder in its environment, and so does all below it,
whoever its parent is by now. Ranks that came here over ssh carry nothing: they are found by their
heartbeats, files of the run that name their host and process.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

import psutil

from pipeline.guards.heartbeat import is_alive, read_beats
from pipeline.options import UserError
from pipeline.run_folder import RunFolder

MARK = "ISOFLOP_RUN"  # the environment's variable
_POLL_SECONDS = 0.2
_KILL_SECONDS = 30.0


def mark(run: Path) -> dict[str, str]:
    """The environment of a command that works on the run, and of all that it starts."""
    inherited = {name: value for name, value in os.environ.items() if name != "RANK"}
    return {**inherited, MARK: str(run)}


def processes_of(run: Path, since: float = float("inf")) -> list[psutil.Process]:
    """What works on the run on this host, this process left out.

    Args:
        since: ranks that wrote a heartbeat after this time (seconds since 1970) belong to it too.
    """
    found = {}
    for process in psutil.process_iter():
        # Others' processes do not show their environment, nor do those that are ending.
        with contextlib.suppress(psutil.Error):
            if process.environ().get(MARK) == str(run):
                found[process.pid] = process
    found |= {process.pid: process for process in ranks_by_heartbeat(run, since)}
    found.pop(os.getpid(), None)
    return list(found.values())


def has_left(process: psutil.Process) -> bool:
    """Whether the process has ended, though maybe its parent has not asked how."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def ranks_by_heartbeat(run: Path, since: float = 0.0) -> list[psutil.Process]:
    """The ranks on this host that wrote a heartbeat after `since`, and live."""
    found = []
    for beat in read_beats(RunFolder(run).heartbeats):
        if beat.time >= since and is_alive(beat):
            with contextlib.suppress(psutil.NoSuchProcess):
                found.append(psutil.Process(beat.pid))
    return found


def ranks_of(run: Path, since: float) -> list[psutil.Process]:
    """Those on this host that train: by their heartbeats after `since`, or by their environment.

    A launcher gave the latter a number, and they inherited it from no other rank.
    """
    found = {process.pid: process for process in ranks_by_heartbeat(run, since)}
    numbered = {}
    for process in processes_of(run):
        with contextlib.suppress(psutil.Error):
            if "RANK" in process.environ():
                numbered[process.pid] = process
    for process in numbered.values():
        with contextlib.suppress(psutil.Error):
            if process.ppid() not in numbered:
                found[process.pid] = process
    return list(found.values())


class Stop:
    """Asks what works on a run to save and leave, and ends whatever is left after a time.

    DeepSpeed's launcher would die at once and leave its ranks behind, so the ranks are asked: they
    agree on a step, save and leave, and the launcher ends after them. One is asked once. Ranks that
    were at work before and that no supervisor started are somebody else's, and are left alone.
    """

    def __init__(self, run: Path, since: float = float("inf")) -> None:
        self._run = run
        self._since = since
        self._asked: set[tuple[int, float]] = set()
        self._others = set(ranks_by_heartbeat(run)) - set(processes_of(run))

    def ask(self) -> list[psutil.Process]:
        """Ask those that were not asked yet; returns everything that is still there."""
        there = self._there()
        targets = ranks_of(self._run, self._since) if there else []
        targets = [process for process in targets if process not in self._others]
        if not targets and any(_is_pdsh(process) for process in there):
            # Its ranks are on other hosts, or an earlier attempt's on this one. (At a signal, a
            # launcher over pdsh would end every process of DeepSpeed's launcher on all hosts, other
            # runs' too.)
            with contextlib.suppress(OSError):
                RunFolder(self._run).stop_file.touch()
        elif not targets:
            # No rank was started yet: there is nothing to save.
            targets = there
        for process in targets:
            with contextlib.suppress(psutil.Error):
                key = (process.pid, process.create_time())
                if key not in self._asked:
                    self._asked.add(key)
                    process.send_signal(signal.SIGTERM)
        return there

    def _there(self) -> list[psutil.Process]:
        found = processes_of(self._run, self._since)
        return [process for process in found if process not in self._others]

    def wait(self, seconds: float) -> int:
        """Ask and wait until nothing is left; the number of processes that had to be killed.

        Raises UserError where a process cannot even be killed.
        """
        deadline = time.monotonic() + seconds
        while self.ask():
            if time.monotonic() > deadline:
                return self.kill()
            time.sleep(_POLL_SECONDS)
        return 0

    def kill(self) -> int:
        """End at once what is there, and what it started meanwhile; how many that were.

        Raises UserError where a process cannot be killed.
        """
        deadline = time.monotonic() + _KILL_SECONDS
        killed = set()
        while there := self._there():
            if time.monotonic() > deadline:
                numbers = ", ".join(str(process.pid) for process in there)
                raise UserError(
                    f"run_dir={str(self._run)!r}: process {numbers} cannot be killed, its disk or "
                    "device does not answer; see to that, and give the same command"
                )
            for process in there:
                killed.add(process.pid)
                with contextlib.suppress(psutil.Error):
                    process.kill()
            psutil.wait_procs(there, timeout=_POLL_SECONDS)
        return len(killed)


def _is_pdsh(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return process.name() == "pdsh"
    return False

"""`isoflop stop`: asks a run to save its state and leave."""

from __future__ import annotations

import contextlib
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from pipeline.options import UserError, option
from pipeline.run_folder import RunFolder
from tools.supervise.lock import supervisor_here
from tools.supervise.processes import has_left, ranks_of


@dataclass(frozen=True)
class Options:
    """Ask the ranks of a run that are on this host to save and leave; those elsewhere follow.

    They are found by the run's heartbeats, or by what a supervisor wrote into their environment; a
    supervisor on this host is told as well, so that it does not start them again. The command that
    started the run goes on from there. The exit code is 0 when something was asked (and has left
    within `wait` seconds), 1 when nothing of the run is on this host, or is still there.
    """

    run: str = option("a run folder", positional=True, metavar="DIR")
    wait: float = option("seconds to wait until it has left (0: do not wait)", 300.0, minimum=0)


def run(options: Options) -> None:
    """Ask, and wait. Exits with 1 where nothing was there, or something still is."""
    folder = Path(options.run).resolve()
    if not folder.is_dir():
        raise UserError(f"run={options.run!r}: no such folder; give a run folder")
    if RunFolder(folder).is_finished:
        print(f"{folder}: finished before; nothing to stop")
        return
    supervisor = supervisor_here(folder)
    # A supervisor asks the ranks itself, and must know not to start them again.
    asked = [supervisor] if supervisor else ranks_of(folder, since=0.0)
    if not asked:
        print(f"error: {folder}: none of its ranks is on this host", file=sys.stderr)
        sys.exit(1)
    for process in asked:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    if options.wait == 0:
        return
    deadline = time.monotonic() + options.wait
    while (alive := [p for p in asked if not has_left(p)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    if alive:
        numbers = ", ".join(str(process.pid) for process in alive)
        print(f"error: {folder}: process {numbers} is still at work", file=sys.stderr)
        sys.exit(1)

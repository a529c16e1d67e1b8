"""`isoflop stop`: asks a run to save its state and leave."""

from __future__ import annotations

import contextlib
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from pipeline.guards.heartbeat import Beat, interval, is_alive, newest_launch, read_beats
from pipeline.options import UserError, option
from pipeline.run_folder import RunFolder
from tools.supervise.lock import supervisor_here
from tools.supervise.processes import has_left, ranks_of

SILENT_AFTER = 30.0  # seconds without a beat, beyond a few, after which a rank is gone


@dataclass(frozen=True)
class Options:
    """Ask the ranks of a run to save and leave, from any host that sees its folder.

    Those on this host are found by the run's heartbeats, or by what a supervisor wrote into their
    environment; a supervisor on this host is told as well, so that it does not start them again.
    Where all of them are on other hosts, a file STOP in the run's folder asks them. The command
    that started the run goes on from there. The exit code is 0 when something was asked (and has
    left within `wait` seconds), 1 when no rank is at work, or is still there.
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
        _ask_elsewhere(RunFolder(folder), options.wait)
        return
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


def _ask_elsewhere(run: RunFolder, seconds: float) -> None:
    """Ask ranks on other hosts, by a file that rank 0 looks for with every beat."""
    there = _at_work(run)
    if not there:
        print(f"error: {run.path}: none of its ranks is at work", file=sys.stderr)
        sys.exit(1)
    run.stop_file.touch()
    print(f"{run.path}: asks {len(there)} rank(s) on {_hosts(there)}", flush=True)
    if seconds == 0:
        return
    deadline = time.monotonic() + seconds
    while (there := _at_work(run)) and time.monotonic() < deadline:
        time.sleep(0.2)
    if there:
        print(f"error: {run.path}: is still at work on {_hosts(there)}", file=sys.stderr)
        sys.exit(1)
    run.stop_file.unlink(missing_ok=True)  # of ranks that left before they saw it


def _at_work(run: RunFolder) -> list[Beat]:
    """The ranks of other hosts that beat a moment ago and have not said good-bye."""
    found = _beating(run)
    if not found:
        # A beat that its host replaces at this moment may not be read over a network.
        time.sleep(0.2)
        found = _beating(run)
    return found


def _beating(run: RunFolder) -> list[Beat]:
    beats, now = newest_launch(read_beats(run.heartbeats)), time.time()
    return [
        beat
        for beat in beats
        if not beat.is_over
        and is_alive(beat) is None
        and now - beat.time < SILENT_AFTER + 3 * interval(beat.world_size)
    ]


def _hosts(beats: list[Beat]) -> str:
    return ", ".join(sorted({beat.host for beat in beats}))

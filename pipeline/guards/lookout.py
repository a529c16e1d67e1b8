"""All ranks' beats as one of them sees them; of many ranks a few read for all the others.

When a large run stalls or loses a rank, every rank wants every other's beat at once: a thousand
ranks would open a million small files of a shared file system. So rank 0 reads them, and writes
what it read to one file for the others; who finds no fresh one there in time does the same.
"""

from __future__ import annotations

import dataclasses
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from pipeline.guards.heartbeat import RANKS_A_SECOND, Beat, Heart, parse_beat, read_beats

DISK = 10.0  # seconds in which the run folder answers, if it answers at all
FRESH = 10.0  # seconds that a look lasts; clocks of hosts differ by half of that at most
TURN, LAST_TURN = 0.25, 15.0  # seconds between ranks that read where those before did not
_NAME = "all.json"
T = TypeVar("T")


def within(seconds: float, work: Callable[[], T], default: T) -> T:
    """What `work` gives; `default` where it takes longer: the disk may be what everyone waits for.

    The thread that does it is left alone then.
    """
    done: list[T] = []
    thread = threading.Thread(target=lambda: done.append(work()), daemon=True)
    thread.start()
    thread.join(seconds)
    return done[0] if done else default


def longest_look(world_size: int) -> float:
    """Seconds that a look may take, of `world_size` ranks."""
    return DISK if world_size <= RANKS_A_SECOND else 2 * DISK + DISK / 2 + LAST_TURN


class Lookout:
    """What one rank sees of the others' beats, in the folder of its heart."""

    def __init__(self, heart: Heart) -> None:
        self._heart = heart
        self._last = 0.0  # Unix seconds of the beats that it saw last

    def others(self) -> list[Beat]:
        """The other ranks' last beats of this launch; none where they cannot be read.

        Two looks that are at least two beats apart see beats that are two beats apart.
        """
        heart, folder = self._heart, self._heart.folder
        if folder is None:
            return []
        found = _read(folder) if heart.world_size <= RANKS_A_SECOND else self._read_by_some(folder)
        return [b for b in found if b.launch == heart.launch and b.rank != heart.rank]

    def _read_by_some(self, folder: Path) -> list[Beat]:
        rank = self._heart.rank
        oldest = max(time.time() - FRESH, self._last + 2 * self._heart.interval)
        until = time.monotonic()
        if rank:
            until += DISK / 2 + min(rank * TURN, LAST_TURN)
        nothing: tuple[float, list[Beat]] = (0.0, [])
        while time.monotonic() < until:
            moment, beats = within(DISK, lambda: _read_all(folder), nothing)
            if moment >= oldest and beats and beats[0].launch == self._heart.launch:
                self._last = moment
                return beats
            time.sleep(TURN)
        self._last = time.time()
        unread: list[Beat] = []
        return within(DISK, lambda: _gather(folder, self._last, rank), unread)


def _read(folder: Path) -> list[Beat]:
    nothing: list[Beat] = []
    return within(DISK, lambda: read_beats(folder), nothing)


def _gather(folder: Path, moment: float, rank: int) -> list[Beat]:
    """Every beat, written to one file as well, as of `moment`."""
    beats = read_beats(folder)
    partial = folder / f".{_NAME}.{rank}.partial"
    text = json.dumps({"time": moment, "beats": [dataclasses.asdict(beat) for beat in beats]})
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, folder / _NAME)
    except OSError:
        # A full disk: the others read for themselves.
        return beats
    return beats


def _read_all(folder: Path) -> tuple[float, list[Beat]]:
    """When the beats of the one file were read, and they; none where there is no such file."""
    try:
        told = json.loads((folder / _NAME).read_text(encoding="utf-8"))
        return float(told["time"]), [parse_beat(each) for each in told["beats"]]
    except (OSError, ValueError, TypeError, KeyError):
        return 0.0, []

"""Ends this process when a rank stands still, and names that rank, its phase and its stack."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import TypeVar

import psutil

from pipeline.guards import stalls
from pipeline.guards.heartbeat import Beat, Heart, beat_file, is_alive, read_beats
from pipeline.guards.stacks import dump_own_stack, own_place, stack_of, write_text

GRACE = 5.0  # seconds in which the rank that speaks has spoken
DISK = 10.0  # seconds in which the run folder answers, if it answers at all
FAULT = 1  # the exit code: another start may succeed
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


class Watchdog:
    """Looked at with every beat of `heart`; the folder of the beats is the heart's.

    It looks at the other ranks' beats twice, and only when its own main thread has stood in one
    phase for long: half of the patience, and all of it.
    """

    def __init__(
        self,
        heart: Heart,
        stall_timeout: float,
        name_lost: Callable[[], tuple[str, int]] = lambda: ("", 0),
    ) -> None:
        """`stall_timeout` in seconds, 0 watches nothing; `name_lost` asks over the network."""
        self._heart = heart
        self._name_lost = name_lost
        self._timeout = stall_timeout
        self._first: list[Beat] | None = None

    def look(self) -> None:
        """End the process where its main thread has stood in one phase for too long."""
        heart = self._heart
        if not self._timeout or heart.folder is None:
            return
        limit = stalls.patience(self._timeout, heart.phase, is_first_step=heart.is_first_step)
        stood = heart.stood()
        if stood < limit / 2:
            self._first = None
        elif self._first is None:
            self._first = self._beats()
        elif stood >= limit:
            self._end(stood)

    def _beats(self) -> list[Beat]:
        heart, folder = self._heart, self._heart.folder
        nothing: list[Beat] = []
        read = nothing if folder is None else within(DISK, lambda: read_beats(folder), nothing)
        others = [b for b in read if b.launch == heart.launch and b.rank != heart.rank]
        return sorted([*others, heart.current()], key=lambda beat: beat.rank)

    def _end(self, stood: float) -> None:
        heart, folder = self._heart, self._heart.folder
        assert folder is not None
        within(DISK, lambda: dump_own_stack(beat_file(folder, heart.rank, "stack")), None)
        seen = stalls.compare(self._first or [], self._beats())
        found = stalls.culprits(seen)
        if stalls.speaker(seen, found) == heart.rank:
            remarks = [self._remark(one) for one in found]
            told = stalls.sentence(found, seen, stood, remarks)
            elsewhere = any(is_alive(one.beat) is None for one in found)
            if (elsewhere or not found) and (lost := self._name_lost()[0]):
                # Their beats may still arrive, by a run folder that all reach.
                told = f"{lost}; all have waited for {stood:.0f} s"
            print(
                f"error: {told}; stacks are in {folder}; the same command goes on from the last "
                "checkpoint",
                file=sys.stderr,
                flush=True,
            )
            within(DISK, lambda: heart.close(f"stall: {told}"), None)
        else:
            time.sleep(GRACE)
        for one in found:
            # Its launcher would wait half a minute for it to answer a SIGTERM.
            if one.is_silent and one.beat.rank != heart.rank and is_alive(one.beat):
                os.kill(one.beat.pid, signal.SIGKILL)
        sys.stdout.flush()
        os._exit(FAULT)

    def _remark(self, one: stalls.Seen) -> str:
        """What this host knows of a rank that holds up the others."""
        if one.beat.rank == self._heart.rank:
            return f"at {own_place()}"
        alive = is_alive(one.beat)
        if alive is None:
            return ""
        if not alive:
            return "its process is gone"
        assert self._heart.folder is not None
        stack, why = stack_of(one.beat.pid)
        file = beat_file(self._heart.folder, one.beat.rank, "stack")
        within(DISK, lambda: write_text(file, stack or f"{why}\n"), None)
        return f"its process is {psutil.Process(one.beat.pid).status()}"

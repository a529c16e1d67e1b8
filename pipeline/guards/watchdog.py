"""Ends this process when a rank stands still, and names that rank, its phase and its stack."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from pipeline.guards import stalls
from pipeline.guards.heartbeat import (
    RANKS_A_SECOND,
    Beat,
    Heart,
    beat_file,
    is_alive,
    state_of,
)
from pipeline.guards.lookout import DISK, Lookout, longest_look, within
from pipeline.guards.stacks import dump_own_stack, own_place, stack_of, write_text

GRACE = 5.0  # seconds in which the rank that speaks has spoken, of a few
PAUSE = 10  # intervals without a look in which the whole process must have been stopped
FAULT = 1  # the exit code: another start may succeed


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
        self._lookout = Lookout(heart)
        self._name_lost = name_lost
        self._timeout = stall_timeout
        self._first: list[Beat] | None = None
        self._again = 0.0  # time.monotonic of the next look at a rank that may take longer
        self._looked = self._resumed = time.monotonic()

    def look(self) -> None:
        """End the process where its main thread has stood in one phase for too long."""
        if not self._timeout or self._heart.folder is None:
            return
        now = time.monotonic()
        if now - self._looked > PAUSE * self._heart.interval:
            # The process itself was stopped (a suspended job): its phases cost no patience then.
            self._resumed, self._first = now, None
        try:
            self._look(now)
        finally:
            self._looked = time.monotonic()

    def _look(self, now: float) -> None:
        heart = self._heart
        limit = self._patience(heart.phase)
        stood = min(heart.stood(), now - self._resumed)
        if stood < limit / 2:
            self._first = None
        elif self._first is None:
            self._first = self._beats()
        elif stood >= limit and now >= self._again:
            beats = self._beats()
            seen = stalls.compare(self._first, beats)
            # Where this rank's own beats do not arrive, neither may those of ranks that live.
            is_known = heart.is_heard and not self._is_blind(seen)
            found = stalls.culprits(seen) if is_known else []
            if found and all(self._may_take_longer(one) for one in found):
                self._first, self._again = beats, now + limit / 4
            else:
                self._end(stood, seen, found)

    def _patience(self, phase: str) -> float:
        return stalls.patience(self._timeout, phase, is_first_step=self._heart.is_first_step)

    def _may_take_longer(self, one: stalls.Seen) -> bool:
        """Whether another rank lives, in a phase that it may still be in: it ends itself later."""
        beat = one.beat
        if one.is_silent or beat.is_over or beat.rank == self._heart.rank:
            return False
        allowed = stalls.patience(self._timeout, beat.phase, is_first_step=beat.is_first_step)
        return beat.time - beat.since < allowed

    def _beats(self) -> list[Beat]:
        """The last that all ranks said; its own alone where others cannot be read."""
        others = self._lookout.others()
        return sorted([*others, self._heart.current()], key=lambda beat: beat.rank)

    def _is_blind(self, seen: Sequence[stalls.Seen]) -> bool:
        """Whether it sees no other rank where there are some."""
        return len(seen) == 1 < self._heart.world_size

    @property
    def _grace(self) -> float:
        """Seconds in which the rank that speaks has looked, and spoken."""
        heart = self._heart
        if heart.world_size <= RANKS_A_SECOND:
            return GRACE
        return GRACE + 2 * heart.interval + longest_look(heart.world_size)

    def _end(self, stood: float, seen: Sequence[stalls.Seen], found: Sequence[stalls.Seen]) -> None:
        try:
            self._tell(stood, seen, found)
        except Exception as error:
            # Whatever the other processes did meanwhile, this one must not stand here for ever.
            print(f"error: stalled for {stood:.0f} s ({error!r})", file=sys.stderr, flush=True)
        finally:
            sys.stdout.flush()
            os._exit(FAULT)

    def _tell(
        self, stood: float, seen: Sequence[stalls.Seen], found: Sequence[stalls.Seen]
    ) -> None:
        heart, folder = self._heart, self._heart.folder
        assert folder is not None
        within(DISK, lambda: dump_own_stack(beat_file(folder, heart.rank, "stack")), None)
        if heart.rank and self._is_blind(seen):
            # Neither may the others see anybody: rank 0 tells it for all.
            time.sleep(self._grace)
        if stalls.speaker(seen, found) == heart.rank:
            remarks = [self._remark(one.beat) for one in found]
            told = stalls.sentence(found, seen, stood, remarks)
            elsewhere = any(is_alive(one.beat) is None for one in found)
            # Who is behind may have waited there for what was sent, and never came.
            waits = all(one.beat.waits and not one.is_silent for one in found)
            if (elsewhere or waits) and (lost := self._name_lost()[0]):
                # Their beats may still arrive, by a run folder that all reach.
                told = f"{lost}; all have waited for {stood:.0f} s"
            if not heart.is_heard or self._is_blind(seen):
                beat, how = heart.current(), "read; see to the disk of"
                if not heart.is_heard:
                    how = "written; make room in"
                told = (
                    f"{beat.name} has stood still for {stood:.0f} s in {beat.place}, and who is "
                    f"behind is not known: heartbeats cannot be {how} {folder}"
                )
            print(
                f"error: {told}; stacks are in {folder}; the same command goes on from the last "
                "checkpoint",
                file=sys.stderr,
                flush=True,
            )
            within(DISK, lambda: heart.close(f"stall: {told}"), None)
            # After the line: each may take seconds, and the launcher ends this process soon.
            for one in found:
                self._keep_stack(one)
        else:
            time.sleep(self._grace)
        for one in found:
            # Its launcher would wait half a minute for it to answer a SIGTERM.
            if one.is_silent and one.beat.rank != heart.rank and is_alive(one.beat):
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(one.beat.pid, signal.SIGKILL)

    def _remark(self, beat: Beat) -> str:
        """What this host knows of a rank that holds up the others."""
        return f"at {own_place()}" if beat.rank == self._heart.rank else state_of(beat)

    def _keep_stack(self, one: stalls.Seen) -> None:
        """Write the stack of another rank of this host that lives."""
        folder = self._heart.folder
        if folder is None or one.beat.rank == self._heart.rank or not is_alive(one.beat):
            return
        stack, why = stack_of(one.beat.pid)
        file = beat_file(folder, one.beat.rank, "stack")
        within(DISK, lambda: write_text(file, stack or f"{why}\n"), None)

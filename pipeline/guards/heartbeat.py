"""`heartbeat/rank-NNNNN.json`: where each rank is, written about once a second; imports no torch.

The training only notes its phase in memory; a thread beside it writes. A rank that stands still
while its thread goes on shows an old phase, one that is frozen or dead an old time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from pipeline.guards.stacks import is_in_collective

ENDED, FAILED = "ended", "failed"
RANKS_A_SECOND = 64  # beats that the run folder's file system takes each second


@dataclasses.dataclass(frozen=True)
class Beat:
    """What one rank last said of itself.

    Attributes:
        rank, world_size: which rank of how many.
        launch: the start of the run that it belongs to, the same on all ranks.
        host, pid, created: its process; `created` is when it began, as `began` says.
        attempt: of the run.
        step: steps made.
        phase: what its main thread does: start, data, vote, forward, backward, step, check, save,
            evaluate, load; at last ended or failed.
        laps: phases begun in this step.
        since: when the phase began, in Unix seconds of its host.
        time: when this was written, likewise.
        error: why it failed.
        waits: whether it stands in a collective, waiting for others.
        is_first_step: whether its process has made no step yet, and may compile.
    """

    rank: int
    world_size: int
    launch: str
    host: str
    pid: int
    created: float
    attempt: int
    step: int
    phase: str
    laps: int
    since: float
    time: float
    error: str = ""
    waits: bool = False
    is_first_step: bool = False

    @property
    def name(self) -> str:
        """The rank for a message."""
        return f"rank {self.rank} (host {self.host}, pid {self.pid})"

    @property
    def place(self) -> str:
        """Where it is, for a message."""
        return f"phase {self.phase} of step {self.step + 1}"

    @property
    def is_over(self) -> bool:
        """Whether the rank said good-bye."""
        return self.phase in (ENDED, FAILED)


def beat_file(folder: Path, rank: int, kind: str = "json") -> Path:
    """Where a rank's beat is (kind json) or its stack (kind stack)."""
    return folder / f"rank-{rank:05d}.{kind}"


def read_beats(folder: Path) -> list[Beat]:
    """The beats in `folder`, by rank; what cannot be read is left out."""
    found = []
    for file in sorted(folder.glob("rank-*.json")):
        try:
            found.append(parse_beat(json.loads(file.read_text(encoding="utf-8"))))
        except (OSError, ValueError, TypeError):
            # Removed or half there on a slow file system: as if it said nothing this time.
            continue
    return sorted(found, key=lambda beat: beat.rank)


_KINDS: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (int, float),
    "str": (str,),
    "bool": (bool,),
}


def parse_beat(fields: dict[str, Any]) -> Beat:
    """The beat that a file holds. Raises TypeError where it is none."""
    beat = Beat(**fields)
    for field in dataclasses.fields(Beat):
        if not isinstance(getattr(beat, field.name), _KINDS[str(field.type)]):
            raise TypeError(field.name)
    return beat


def interval(world_size: int) -> float:
    """Seconds between two beats of a rank."""
    return max(1.0, world_size / RANKS_A_SECOND)


def newest_launch(beats: list[Beat]) -> list[Beat]:
    """The beats of the last start alone: an earlier one may have had more ranks."""
    if not beats:
        return []
    launch = max(beats, key=lambda beat: beat.time).launch
    return [beat for beat in beats if beat.launch == launch]


def began(process: psutil.Process) -> float:
    """When `process` began, in seconds after its host did: a clock that is set does not move it."""
    return process.create_time() - psutil.boot_time()


def is_alive(beat: Beat) -> bool | None:
    """Whether the rank's process lives; None where it is another host's."""
    if beat.host != socket.gethostname():
        return None
    try:
        process = psutil.Process(beat.pid)
        same = abs(began(process) - beat.created) < 1.0
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def state_of(beat: Beat) -> str:
    """What this host knows of the rank's process, in words; "" where it is another host's."""
    alive = is_alive(beat)
    if alive is None:
        return ""
    with contextlib.suppress(psutil.NoSuchProcess):
        if alive:
            return f"its process is {psutil.Process(beat.pid).status()}"
    return "its process is gone"


class _Now(NamedTuple):
    """What the main thread does; replaced whole, so that another thread never sees half of it."""

    phase: str
    step: int
    laps: int
    since: float  # time.monotonic


class Heart:
    """This rank's heartbeat. Without `beat_into` nothing is written."""

    def __init__(self, rank: int = 0, world_size: int = 1) -> None:
        self.rank = rank
        self.world_size = world_size
        self.attempt = 0
        self.launch = ""
        self.folder: Path | None = None
        self.interval = interval(world_size)
        self.is_heard = True  # whether the last beat could be written
        self._now = _Now("start", 0, 0, time.monotonic())
        self._steps_begun = 0
        self._watchers: list[Callable[[], None]] = []
        self._beside: list[Callable[[], None]] = []
        self._stopped = threading.Event()
        self._threads: list[threading.Thread] = []
        self._writing = threading.Lock()
        self._host, self._pid = socket.gethostname(), os.getpid()
        self._created = began(psutil.Process())

    def begin(self, phase: str) -> None:
        """The main thread goes on to `phase`. Costs less than a microsecond."""
        now = self._now
        self._now = _Now(phase, now.step, now.laps + 1, time.monotonic())

    def begin_step(self, step: int, phase: str) -> None:
        """The main thread has made `step` steps and goes on to `phase` of the next."""
        self._steps_begun += 1
        self._now = _Now(phase, step, 0, time.monotonic())

    @property
    def phase(self) -> str:
        """What the main thread does."""
        return self._now.phase

    @property
    def is_first_step(self) -> bool:
        """Whether this process has made no step yet: compiling may take long."""
        return self._steps_begun < 2

    def stood(self) -> float:
        """Seconds since the phase began."""
        return time.monotonic() - self._now.since

    def watch(self, look: Callable[[], None]) -> None:
        """Call `look` once a beat, in a thread of its own: writing may hang with its disk."""
        self._watchers.append(look)

    def after_writing(self, work: Callable[[], None]) -> None:
        """Call `work` after each beat that was written, in the thread that waits for the disk."""
        self._beside.append(work)

    def start(self) -> None:
        """Begin to beat; what `watch` was given is called from now on."""
        for work in (self._write_on, self._look_on):
            thread = threading.Thread(target=work, name=f"heartbeat {work.__name__}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def beat_into(self, folder: Path, launch: str) -> None:
        """Write to `folder` from now on. Raises OSError where it cannot be made."""
        folder.mkdir(parents=True, exist_ok=True)
        self.launch, self.folder = launch, folder
        self.write()

    def close(self, error: str = "") -> None:
        """Say good-bye: ended, or failed with the reason. What is said first stays."""
        if self._stopped.is_set():
            return
        self._stopped.set()
        with self._writing:
            now = self._now
            self._now = now._replace(phase=FAILED if error else ENDED)
            self._put(error)
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(5)

    def current(self, error: str = "") -> Beat:
        """What would be written now."""
        now, clock = self._now, time.time()
        return Beat(
            rank=self.rank,
            world_size=self.world_size,
            launch=self.launch,
            host=self._host,
            pid=self._pid,
            created=self._created,
            attempt=self.attempt,
            step=now.step,
            phase=now.phase,
            laps=now.laps,
            since=round(clock - (time.monotonic() - now.since), 3),
            time=round(clock, 3),
            error=error,
            waits=self.stood() > 2 * self.interval and is_in_collective(),
            is_first_step=self.is_first_step,
        )

    def write(self) -> None:
        """Write the beat whole; no reader sees half of it. Nothing follows a good-bye."""
        with self._writing:
            if not self._stopped.is_set():
                self._put()

    def _put(self, error: str = "") -> None:
        if self.folder is None:
            return
        target = beat_file(self.folder, self.rank)
        partial = target.with_name(f".{target.name}.partial")
        try:
            # Not brought to disk: who reads it reads it now.
            partial.write_text(json.dumps(dataclasses.asdict(self.current(error))) + "\n")
            os.replace(partial, target)
            self.is_heard = True
        except OSError:
            # A full disk must not end a run that trains. Whoever reads sees an old beat, and the
            # next one comes in a second.
            self.is_heard = False

    def _write_on(self) -> None:
        while not self._stopped.wait(self.interval):
            self.write()
            for work in self._beside:
                work()

    def _look_on(self) -> None:
        while not self._stopped.wait(self.interval):
            for look in self._watchers:
                look()

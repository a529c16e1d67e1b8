"""What watches over one attempt at a run, from its first line to the process's end."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Protocol

from pipeline.config import RunConfig
from pipeline.guards.causes import cause_of
from pipeline.guards.heartbeat import Heart
from pipeline.guards.launcher import Launcher, outlive_readers
from pipeline.guards.memory import OutOfMemory, advice, held_here, is_out_of_memory
from pipeline.guards.watchdog import FAULT, Watchdog
from pipeline.options import Fault, UserError
from pipeline.run_folder import RunFolder


class Network(Protocol):
    """What knows of the other ranks over the network: rendezvous.Meeting, which needs torch."""

    def name_lost(self) -> tuple[str, int]: ...


class Guards:
    """The heartbeat of this rank and those who look at it.

    Attributes:
        heart: beats from the start, into the run folder once the ranks have met.
        network: tells who is cut off, which a run folder that all reach does not show; None where
            the ranks have not met there.
    """

    def __init__(self, config: RunConfig, folder: RunFolder) -> None:
        rank, world_size = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
        self.heart = Heart(int(rank), int(world_size))
        self.network: Network | None = None
        self._folder = folder
        self._launcher = Launcher()
        self._vote: Callable[[], None] | None = None
        self._stop: Callable[[], None] | None = None
        self._is_orphan = False
        self.heart.watch(self._look_for_launcher)
        if self.heart.rank == 0:
            self.heart.after_writing(self._look_for_wish)
        self.heart.watch(Watchdog(self.heart, config.stall_timeout, self.name_lost).look)

    def name_lost(self) -> tuple[str, int]:
        """One line on the ranks that no longer answer over the network, or ""; who tells it."""
        return ("", 0) if self.network is None else self.network.name_lost()

    def meet(self) -> None:
        """The ranks have met: their heartbeats belong together from here on. A collective."""
        from pipeline.distributed import same_everywhere

        self.heart.begin("start")
        self.heart.beat_into(self._folder.heartbeats, same_everywhere(f"{time.time():.6f}"))

    def on_orphaned(self, vote: Callable[[], None]) -> None:
        """From now on there is something to save: `vote` for it when the launcher is gone."""
        self._vote = vote

    def on_asked(self, stop: Callable[[], None]) -> None:
        """From now on, `stop` where the run folder's file asks for it."""
        self._stop = stop

    def explain(self, error: Exception, config: RunConfig) -> UserError | None:
        """One line in the place of a traceback, where the cause is known."""
        if is_out_of_memory(error):
            heart = self.heart
            beat = heart.current()
            told = advice(config, heart.world_size, held_here(error), beat.place)
            # Once steps fitted, another start may: memory in pieces, another process's share.
            kind = OutOfMemory if heart.is_first_step else Fault
            return kind(f"{beat.name}: {told}", told_by=heart.rank)
        return cause_of(error, self.heart, self.name_lost)

    def _look_for_wish(self) -> None:
        # A disk that does not answer is the heartbeat's own matter.
        with suppress(OSError):
            if self._stop is not None and self._folder.stop_file.exists():
                self._stop()  # whether the file can be removed or not
                self._folder.stop_file.unlink()

    def _look_for_launcher(self) -> None:
        if self._is_orphan or not self._launcher.is_gone():
            return
        self._is_orphan = True
        if self._vote is None:
            # Nothing was trained yet, and the others may never come to meet this rank.
            print("error: the launcher is gone before the training began", flush=True)
            os._exit(FAULT)
        print(f"rank {self.heart.rank}: the launcher is gone; votes to save and leave", flush=True)
        self._vote()


@contextmanager
def guarded(config: RunConfig, folder: RunFolder) -> Iterator[Guards]:
    """Watch over what is done inside.

    An error whose cause is known leaves as a UserError, which is one line.
    """
    outlive_readers()
    guards = Guards(config, folder)
    guards.heart.start()
    try:
        yield guards
    except UserError as error:
        guards.heart.close(str(error))
        raise
    except Exception as error:
        known = guards.explain(error, config)
        guards.heart.close(str(known or f"{type(error).__name__}: {error}"))
        if known is None:
            raise
        raise known from error
    finally:
        guards.heart.close()

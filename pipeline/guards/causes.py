"""From an exception that would be a page of traceback to the one line that says what happened."""

from __future__ import annotations

import dataclasses
import os
import socket
import time
from collections.abc import Callable

from pipeline.guards import stalls
from pipeline.guards.heartbeat import FAILED, Beat, Heart, is_alive, state_of
from pipeline.guards.lookout import Lookout
from pipeline.options import Fault, UserError
from pipeline.program import no_room

# What gloo, NCCL and the store say where the process at the other end is gone or does not answer.
_BROKEN = (
    "connection closed",
    "connection reset",
    "connection refused",
    "connection was forcibly closed",
    "broken pipe",
    "read error",
    "timed out waiting",
    "application timeout",
    "gloo",
    "socket timeout",
    "nccl",
    "remote process exited",
)
GO_ON = "the same command goes on from the last checkpoint"


class NoRoom(Fault):
    """A disk that takes no more: somebody must make room first."""

    exit_code = UserError.exit_code


def cause_of(
    error: Exception, heart: Heart, name_lost: Callable[[], tuple[str, int]] = lambda: ("", 0)
) -> UserError | None:
    """What is behind `error`, where that is known; else the traceback says more.

    `name_lost` says in a line which ranks no longer answer over the network, or "", and who tells.
    """
    if isinstance(error, OSError) and (told := no_room(error)):
        return NoRoom(f"{told}, and {GO_ON}", told_by=heart.rank)
    text = str(error).lower()
    if isinstance(error, RuntimeError) and any(words in text for words in _BROKEN):
        lookout = Lookout(heart)
        return (
            _lost(heart, lookout)
            or _waited_for(heart, lookout, name_lost, error)
            or _unconnected(text)
        )
    return None


def _waited_for(
    heart: Heart, lookout: Lookout, name_lost: Callable[[], tuple[str, int]], error: Exception
) -> UserError | None:
    """The ranks that live and did not come, or that the network no longer reaches."""
    started, first = time.monotonic(), lookout.others()
    told, teller = name_lost()
    if first:
        time.sleep(max(0.0, 2.5 * heart.interval - (time.monotonic() - started)))
    later = lookout.others()
    gone = [beat for beat in later if _is_gone(beat)]
    if gone and not told:
        return Fault(lost_sentence(gone), told_by=speaker(gone, heart.world_size))
    # It waited until the error came; whether GPUs wait does not show on any rank.
    own = dataclasses.replace(heart.current(), waits="nccl" not in str(error).lower())
    seen = stalls.compare(first, sorted([*later, own], key=lambda beat: beat.rank))
    found = stalls.culprits(seen) if later and heart.is_heard else []
    if any(one.beat.rank == heart.rank for one in found):
        found = []
    elsewhere = any(is_alive(one.beat) is None for one in found)
    waits = all(one.beat.waits and not one.is_silent for one in found)
    if told and (gone or elsewhere or waits):
        # Beats may still arrive, in a folder that all reach; the other side tells of this one.
        return Fault(f"{told} ({str(error).splitlines()[0][-120:]}); {GO_ON}", told_by=teller)
    if not found:
        return None
    late = [one.beat for one in found]
    sentence = stalls.sentence(found, seen, heart.stood(), [state_of(beat) for beat in late])
    return Fault(f"{sentence}; {GO_ON}", told_by=speaker(late, heart.world_size))


def _unconnected(text: str) -> UserError | None:
    """Ranks that all reached the first one, and not each other."""
    if "connectfullmesh" not in text:
        return None
    interface = os.environ.get("GLOO_SOCKET_IFNAME", "")
    return Fault(
        f"the ranks answer at MASTER_ADDR={os.environ.get('MASTER_ADDR')}, but gloo cannot connect "
        f"them with each other (GLOO_SOCKET_IFNAME={interface!r} on {socket.gethostname()}); let "
        "the nodes reach each other's ports, or name the interface that leads to all of them"
    )


def _lost(heart: Heart, lookout: Lookout) -> UserError | None:
    """The ranks that are gone: seen at once on this host, by their silence on another."""
    first = lookout.others()
    gone = [beat for beat in first if _is_gone(beat)]
    if not gone and any(is_alive(beat) is None for beat in first):
        time.sleep(2.5 * heart.interval)
        before = {beat.rank: beat.time for beat in first}
        later = lookout.others()
        gone = [b for b in later if b.phase == FAILED or b.time == before.get(b.rank)]
    if not gone:
        return None
    return Fault(lost_sentence(gone), told_by=speaker(gone, heart.world_size))


def _is_gone(beat: Beat) -> bool:
    return beat.phase == FAILED or is_alive(beat) is False


def lost_sentence(gone: list[Beat]) -> str:
    """One line that names the ranks that are gone and where they were."""
    told = [
        f"{beat.name} failed in step {beat.step + 1}: {beat.error}"
        if beat.phase == FAILED
        else f"{beat.name} is gone; it was last seen in {beat.place}"
        for beat in gone
    ]
    return f"{'; '.join(told)}; {GO_ON}"


def speaker(gone: list[Beat], world_size: int) -> int:
    """The rank that tells of it: one that failed tells it itself, else the first that is left."""
    failed = [beat.rank for beat in gone if beat.phase == FAILED]
    left = sorted(set(range(world_size)) - {beat.rank for beat in gone})
    return (failed or left or [0])[0]

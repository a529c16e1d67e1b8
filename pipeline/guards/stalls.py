"""Which rank holds up the others, from what all of them last said: pure, no clocks and no files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.guards.heartbeat import Beat

# What may rightly take long: the rendezvous and the engine, a checkpoint on a slow disk, what may
# compile (the first step of a process, an evaluation).
LONG_PHASES = frozenset({"start", "save", "load", "evaluate"})
LONGER, AT_LEAST = 6, 60.0


def patience(stall_timeout: float, phase: str, *, is_first_step: bool) -> float:
    """Seconds that a main thread may stay in one phase."""
    if is_first_step or phase in LONG_PHASES:
        return max(LONGER * stall_timeout, AT_LEAST)
    return stall_timeout


@dataclass(frozen=True)
class Seen:
    """Another rank as two looks at its heartbeat show it.

    Attributes:
        beat: at the second look.
        is_silent: no beat came between the two.
    """

    beat: Beat
    is_silent: bool


def compare(first: Sequence[Beat], second: Sequence[Beat]) -> list[Seen]:
    """Two looks at the beats, at least two beats apart; ranks that only one shows count as new."""
    before = {beat.rank: beat.time for beat in first}
    return [Seen(beat, before.get(beat.rank) == beat.time) for beat in second]


def culprits(seen: Sequence[Seen]) -> list[Seen]:
    """Whom the others wait for; nobody where all stand at the same place (a broken network).

    Whoever is silent, frozen or dead, explains a stall. Else whoever is behind: ranks meet in every
    step, so all wait for the one that has begun the fewest phases. Of several, whoever does not
    itself wait in a collective.
    """
    silent = [one for one in seen if one.is_silent and not one.beat.is_over]
    # Where nobody's beat arrives, the run folder is to blame and silence says nothing.
    if silent and len(silent) < len(seen):
        return silent
    reached = [(one.beat.step, one.beat.laps) for one in seen]
    behind = [one for one, place in zip(seen, reached, strict=True) if place == min(reached)]
    busy = [one for one in behind if not one.beat.waits]
    found = busy or behind
    return found if len(found) < len(seen) or len(seen) == 1 else []


def speaker(seen: Sequence[Seen], found: Sequence[Seen]) -> int:
    """The rank that tells of it: a culprit that can speak, else the first that can."""
    able = [one.beat.rank for one in found if not one.is_silent]
    return min(able or [one.beat.rank for one in seen if not one.is_silent], default=0)


def sentence(
    found: Sequence[Seen], seen: Sequence[Seen], stood: float, remarks: Sequence[str]
) -> str:
    """One line for the user; `remarks` has one for each of `found`, or ""."""
    if not found:
        place = seen[0].beat.place if seen else "the same phase"
        return (
            f"all ranks have stood still for {stood:.0f} s in {place} and none is behind: "
            "the network between them fails, or what all of them wait for"
        )
    told = []
    for one, remark in zip(found, remarks, strict=True):
        how = "gives no sign of life since" if one.is_silent else "stands still in"
        told.append(f"{one.beat.name} {how} {one.beat.place}" + (f" ({remark})" if remark else ""))
    waited = "this has lasted" if len(seen) == len(found) else "the others have waited for"
    return f"{'; '.join(told)}; {waited} {stood:.0f} s"

"""`isoflop doctor`: where each rank of a run is, who is behind, and what keeps it; no torch."""

from __future__ import annotations

import json
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.guards.heartbeat import (
    FAILED,
    Beat,
    interval,
    is_alive,
    newest_launch,
    read_beats,
)
from pipeline.guards.stacks import stack_of
from pipeline.guards.stalls import patience
from pipeline.options import UserError, option

UNHEALTHY = 1
WAITED = 2.0  # seconds: two ranks' beats are that far apart even where nobody waits


@dataclass(frozen=True)
class Options:
    """Say where every rank of a run is, from the heartbeats in its folder.

    For each rank: phase, step, how long it has been there and how old its heartbeat is, whether its
    process lives (told on its own host alone), and which ranks are behind. Then the run: finished
    or not, who holds its lock, the newest whole checkpoint, the last line of metrics.jsonl. Stacks
    of live ranks of this host are shown by py-spy (extra `cluster`). The exit code is 0 for a run
    that is finished, was stopped, or whose ranks all go on; 1 where a rank is gone, has failed, is
    silent or stands still; 2 for a mistake in the command.
    """

    run: str = option("a run folder", positional=True, metavar="DIR")
    stacks: bool = option("show the stacks of live ranks of this host", True)
    json: bool = option("print everything as JSON", False)
    silent_after: float = option(
        "seconds after which a heartbeat counts as silent", 30.0, minimum=1
    )
    stuck_after: float | None = option(
        "seconds in one phase that count as standing still (default: the run's stall_timeout)", None
    )


@dataclass(frozen=True)
class Finding:
    """One rank.

    Attributes:
        state: goes_on, stands_still, silent, gone, failed or ended.
        age: seconds since its last heartbeat.
        in_phase: seconds that it has been in its phase, up to that heartbeat.
        alive: whether its process lives; None where it is another host's.
        is_behind: others wait for it.
        stack: by py-spy, or why there is none.
    """

    rank: int
    host: str
    pid: int
    state: str
    phase: str
    step: int
    in_phase: float
    age: float
    alive: bool | None
    is_behind: bool
    error: str
    stack: str = ""


def run(options: Options) -> None:
    """Examine the run; exits with 1 where something is wrong."""
    from pipeline.run_folder import RunFolder

    folder = RunFolder(options.run)
    asked = folder.read_config()["run"]
    limit = options.stuck_after or _number(asked.get("stall_timeout")) or 300.0
    beats = newest_launch(read_beats(folder.heartbeats))
    if options.stuck_after is not None and options.stuck_after <= 0:
        raise UserError(f"stuck_after={options.stuck_after}: not above 0; give seconds")
    alive = {beat.rank: is_alive(beat) for beat in beats}
    # Many ranks write seldom.
    silent = max(options.silent_after, 3 * interval(max((b.world_size for b in beats), default=1)))
    by_phase = options.stuck_after is None
    findings = examine(beats, alive, time.time(), silent=silent, stuck=limit, by_phase=by_phase)
    if options.stacks:
        findings = [with_stack(finding) for finding in findings]
    told = {"run": about(folder, asked), "ranks": [asdict(finding) for finding in findings]}
    print(json.dumps(told) if options.json else "\n".join(lines(told["run"], beats, findings)))
    if not is_healthy(folder.is_finished, findings):
        sys.exit(UNHEALTHY)


def examine(
    beats: Sequence[Beat],
    alive: dict[int, bool | None],
    now: float,
    *,
    silent: float,
    stuck: float,
    by_phase: bool = False,
) -> list[Finding]:
    """What the beats of one launch say at `now`, in Unix seconds: pure.

    `by_phase`: more than `stuck` seconds are given to the phases that the watchdog gives more.
    """
    working = [beat for beat in beats if not beat.is_over]
    last = min(((beat.step, beat.laps) for beat in working), default=None)
    ahead = [beat for beat in working if (beat.step, beat.laps) != last]
    is_waited_for = bool(ahead) and all(beat.time - beat.since >= WAITED for beat in ahead)
    found = []
    for beat in beats:
        age, in_phase = max(0.0, now - beat.time), max(0.0, beat.time - beat.since)
        limit = _patience(stuck, beat) if by_phase else stuck
        behind = is_waited_for and not beat.is_over and (beat.step, beat.laps) == last
        state = "goes_on"
        if beat.is_over:
            state = beat.phase
        elif alive[beat.rank] is False:
            state = "gone"
        elif age > silent:
            state = "silent"
        elif in_phase > limit:
            state = "stands_still"
        found.append(
            Finding(
                rank=beat.rank,
                host=beat.host,
                pid=beat.pid,
                state=state,
                phase=beat.phase,
                step=beat.step + 1,
                in_phase=round(in_phase, 1),
                age=round(age, 1),
                alive=alive[beat.rank],
                is_behind=behind,
                error=beat.error,
            )
        )
    return found


def _patience(stuck: float, beat: Beat) -> float:
    return patience(stuck, beat.phase, is_first_step=beat.is_first_step)


def is_healthy(is_finished: bool, findings: Sequence[Finding]) -> bool:
    """Whether nobody needs to look after the run."""
    return is_finished or all(each.state in ("goes_on", "ended") for each in findings)


def with_stack(finding: Finding) -> Finding:
    """The finding with the stack of its process, where that lives on this host."""
    if not finding.alive or finding.state in ("ended", FAILED):
        return finding
    stack, why = stack_of(finding.pid)
    return Finding(**{**asdict(finding), "stack": stack or why})


def about(folder: Any, asked: dict[str, Any]) -> dict[str, Any]:
    """The run as a whole."""
    from pipeline.checkpointing.names import list_steps

    last, problem = None, ""
    try:
        last = next(reversed(folder.lines("metrics.jsonl")), None)
    except UserError as error:
        problem = str(error)
    return {
        "folder": str(folder.path),
        "finished": folder.is_finished,
        "steps": asked.get("steps"),
        "problem": problem,
        "lock": lock_holder(folder.path),
        "newest_checkpoint": max(list_steps(folder.checkpoints), default=None),
        "last_metrics": last and {k: last.get(k) for k in ("step", "attempt", "loss", "seconds")},
        "host": socket.gethostname(),
    }


def _number(value: object) -> float:
    """`value`, or 0 where a damaged config.json holds no number."""
    return float(value) if isinstance(value, (int, float)) else 0.0


def lock_holder(path: Path) -> str:
    """Who works on the run, as far as this host can see; "" for nobody."""
    import fcntl

    try:
        with (path / ".lock").open("r", encoding="utf-8") as handle:
            holder = handle.read().strip() or "?"
            try:
                fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return f"process {holder}"
    except OSError:
        # Never locked, or not ours to read.
        return ""
    return ""


def lines(run: dict[str, Any], beats: Sequence[Beat], findings: Sequence[Finding]) -> list[str]:
    """All of it for people."""
    state = "finished" if run["finished"] else "not finished"
    last, saved = run["last_metrics"], run["newest_checkpoint"]
    loss = last and ("not finite" if last["loss"] is None else f"{_number(last['loss']):.4f}")
    text = [
        f"{run['folder']}: {state}; lock: {run['lock'] or 'nobody on this host'}; newest whole "
        f"checkpoint: {'none' if saved is None else f'step {saved}'}; last step: "
        + (f"{last['step']} of {run['steps']}, loss {loss}" if last else "none")
    ]
    if run["problem"]:
        text.append(run["problem"])
    missing = (beats[0].world_size if beats else 0) - len(beats)
    if not beats:
        text.append("no heartbeats: it was never started, or its hosts write to another disk")
    elif missing:
        text.append(f"{missing} of {beats[0].world_size} ranks have no heartbeat here")
    for each in findings:
        lives = {True: "lives", False: "is gone", None: "on another host"}[each.alive]
        text.append(
            f"rank {each.rank} ({each.host}, pid {each.pid}, {lives}): "
            f"{each.state.replace('_', ' ')}; {each.phase} of step {each.step} for "
            f"{each.in_phase:.0f} s, heard {each.age:.0f} s ago"
            + ("; behind the others" if each.is_behind else "")
            + (f"; {each.error}" if each.error else "")
        )
    for each in findings:
        if each.stack:
            text += [f"--- rank {each.rank}", each.stack.rstrip()]
    return text

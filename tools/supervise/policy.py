"""What the end of an attempt means, and how long to wait before the next; pure."""

from __future__ import annotations

import enum
import signal
from dataclasses import dataclass

LONGEST_WAIT = 300.0  # seconds before an attempt
STOPPED = 130  # the exit code of a run that was asked to stop and saved its state
MISTAKE = 2  # the exit code of a setting that is wrong, or of what only a person can mend


class Verdict(enum.Enum):
    """How an attempt ended."""

    FINISHED = "finished"
    STOPPED = "stopped"  # somebody asked for it: the ranks agreed and saved
    MISTAKE = "refused"  # it would be refused again
    CRASHED = "crashed"


def judge(code: int, *, finished: bool, asked: bool) -> Verdict:
    """What an attempt's end means.

    Args:
        code: the launcher's exit code, negative for a signal. DeepSpeed's is 0 where the process
            that starts the ranks was killed, so that it alone proves nothing.
        finished: whether the run's folder says FINISHED.
        asked: whether the supervisor passed on a stop.
    """
    if finished:
        return Verdict.FINISHED
    if asked or code == STOPPED:
        return Verdict.STOPPED
    return Verdict.MISTAKE if code == MISTAKE else Verdict.CRASHED


@dataclass
class Restarts:
    """Counts attempts in a row that brought no new checkpoint: each new one refills the budget.

    Where checkpoints were lost, those damaged and set aside, new is what comes after the one that
    the run went back to; so often alone as a run may be started again, until it gets further than
    ever: checkpoints that come and go shall not keep it at work for ever.

    Attributes:
        limit: how many times a run is started again without one between.
        backoff: seconds before the first; each further one waits twice as long.
        reached: the newest whole checkpoint's step that counts; 0 without any.
        in_a_row: restarts since it came.
        farthest: the newest there has been.
        losses: times that the newest was gone since then.
    """

    limit: int
    backoff: float
    reached: int = 0
    in_a_row: int = 0
    farthest: int = 0
    losses: int = 0

    def __post_init__(self) -> None:
        """A supervisor that begins knows of no other."""
        self.farthest = max(self.farthest, self.reached)

    def wait_after_crash(self, reached: int) -> float | None:
        """Seconds to wait before the next attempt; None where there shall be none.

        Args:
            reached: the newest whole checkpoint's step now.
        """
        if reached > self.farthest:
            self.farthest, self.losses = reached, 0
        if reached > self.reached:
            self.reached, self.in_a_row = reached, 0
        elif reached < self.reached:
            self.losses += 1
            if self.losses <= self.limit:
                self.reached = reached
        if self.in_a_row >= self.limit:
            return None
        self.in_a_row += 1
        return float(min(self.backoff * 2 ** (self.in_a_row - 1), LONGEST_WAIT))


def describe_code(code: int) -> str:
    """An exit code in words.

    DeepSpeed's launcher passes a rank's signal n on as 256 - n; 255 is what ssh says of itself.
    """
    number = -code if code < 0 else 256 - code if 192 < code < 255 else 0
    try:
        return f"exit code {code} ({signal.Signals(number).name})"
    except ValueError:
        return f"exit code {code}"

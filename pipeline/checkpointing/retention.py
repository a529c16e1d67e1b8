"""Which checkpoints are made and which are kept: pure functions of steps and scores."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.callbacks.base import StepRecord
    from pipeline.config import RunConfig


@dataclass(frozen=True)
class Retention:
    """What a run asks for.

    Attributes:
        save_every: steps between checkpoints; 0: none but the last.
        keep_last: newest checkpoints kept.
        keep_every: multiples of this many steps are made and kept; 0: none.
        log_spaced: checkpoints in each factor of ten of steps that are made and kept, for scaling
            curves; 0: none.
    """

    save_every: int
    keep_last: int
    keep_every: int = 0
    log_spaced: int = 0

    @classmethod
    def of(cls, config: RunConfig) -> Retention:
        """What `config` asks for."""
        return cls(
            save_every=config.checkpoint_every,
            keep_last=config.keep_checkpoints,
            keep_every=config.keep_every,
            log_spaced=config.log_spaced_checkpoints,
        )

    def is_due(self, step: int) -> bool:
        """Whether a checkpoint is made at `step`."""
        return _divides(self.save_every, step) or self.stays(step)

    def falls_due(self, record: StepRecord) -> bool:
        """Whether a checkpoint is made after a step: a due one waits for a step that is applied.

        Skipped steps may come of what the weights have become, which is not to take the place of
        the checkpoints before.
        """
        due = map(self.is_due, range(record.step - record.skipped_before, record.step + 1))
        return record.applied and any(due)

    def stays(self, step: int) -> bool:
        """Whether a checkpoint of `step` is never removed."""
        return _divides(self.keep_every, step) or is_log_spaced(step, self.log_spaced)

    def superfluous(self, steps: Iterable[int], scores: Mapping[int, float]) -> list[int]:
        """Those of the whole checkpoints `steps` that may go.

        The newest stay, and the best of those that were scored.
        """
        newest_first = sorted(set(steps), reverse=True)
        best = best_step(newest_first, scores)
        return [
            step
            for step in newest_first[max(1, self.keep_last) :]
            if step != best and not self.stays(step)
        ]


def best_step(steps: Iterable[int], scores: Mapping[int, float]) -> int | None:
    """The step with the lowest held-out loss; the earliest of equals; None where none has one."""
    scored = [s for s in steps if math.isfinite(scores.get(s, math.nan))]
    return min(scored, key=lambda step: (scores[step], step), default=None)


def is_log_spaced(step: int, per_decade: int) -> bool:
    """Whether `step` is one of round(10^(i / per_decade)), i = 0, 1, 2, …"""
    if per_decade < 1 or step < 1:
        return False
    nearest = round(per_decade * math.log10(step))
    # Rounding makes early steps coincide; one of three neighbours decides.
    return any(round(10 ** (i / per_decade)) == step for i in (nearest - 1, nearest, nearest + 1))


def _divides(every: int, step: int) -> bool:
    return every > 0 and step > 0 and step % every == 0

"""The live line: where the run is, how fast, and how long it will take."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

from pipeline.callbacks.base import Callback, StepRecord

if TYPE_CHECKING:
    from pipeline.trainer import Trainer


class Progress(Callback):
    """One updating line on a terminal, a plain line now and then elsewhere."""

    def __init__(self, every_seconds: float = 10.0) -> None:
        self._terminal = sys.stderr.isatty()
        self._interval = 0.2 if self._terminal else every_seconds
        self._shown = 0.0
        self._started = 0.0
        self._first_step = 0

    def on_start(self, trainer: Trainer) -> None:
        """Start the clock."""
        self._started = self._shown = time.monotonic()
        self._first_step = trainer.step

    def on_step(self, trainer: Trainer, record: StepRecord) -> None:
        """Show the line when it is due."""
        now = time.monotonic()
        if not trainer.world.is_main or now - self._shown < self._interval:
            return
        self._shown = now
        steps = trainer.config.steps
        per_step = (now - self._started) / (record.step - self._first_step)
        left = per_step * (steps - record.step)
        line = (
            f"{trainer.config.name}: step {record.step}/{steps}  loss {record.loss:.4f}  "
            f"{record.step_tokens / max(record.seconds, 1e-9):,.0f} tokens/s  "
            f"{duration(left)} left"
        )
        end = "\r" if self._terminal else "\n"
        print(f"\x1b[2K{line}" if self._terminal else line, end=end, file=sys.stderr, flush=True)

    def on_rolled_back(self, trainer: Trainer) -> None:
        """Estimate anew."""
        self.on_start(trainer)

    def on_end(self, trainer: Trainer) -> None:
        """Leave the terminal's line; say how often each source was gone through."""
        self.on_stop(trainer)
        epochs = ", ".join(f"{name} {value:.3f}" for name, value in trainer.epochs().items())
        trainer.say(f"epochs of each source: {epochs}")

    def on_stop(self, trainer: Trainer) -> None:
        """Leave the terminal's line."""
        if self._terminal and trainer.world.is_main:
            print(file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """`seconds` for a person: 42s, 3m10s, 2h05m, 3d04h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"

"""Checkpoints during the run, when it is stopped, and at its end."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline import checkpoint
from pipeline.callbacks.base import Callback, StepRecord

if TYPE_CHECKING:
    from pipeline.trainer import Trainer


class Saving(Callback):
    """Saves each `checkpoint_every` steps, on a stop, and at the end."""

    def __init__(self) -> None:
        self._saved_step = -1

    def on_start(self, trainer: Trainer) -> None:
        """What the run goes on from is saved already."""
        if trainer.step > 0:
            self._saved_step = trainer.step

    def on_step(self, trainer: Trainer, record: StepRecord) -> None:
        """Save at every `checkpoint_every`-th step."""
        every = trainer.config.checkpoint_every
        if every and trainer.step % every == 0:
            self._save(trainer)

    def on_end(self, trainer: Trainer) -> None:
        """Save the finished model."""
        self._save(trainer)

    def on_stop(self, trainer: Trainer) -> None:
        """Save where the run stands, so that it goes on from there."""
        if trainer.step > 0:
            self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        if trainer.step == self._saved_step:
            return
        checkpoint.save(
            trainer.engine,
            trainer.folder.checkpoints,
            trainer.world,
            trainer.state(),
            trainer.config.keep_checkpoints,
        )
        self._saved_step = trainer.step

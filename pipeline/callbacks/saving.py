"""Checkpoints during the run, when it is stopped, and at its end; which of them stay."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import checkpoint
from pipeline.atomic import make_folder, write_atomically
from pipeline.callbacks.base import Callback, StepRecord
from pipeline.checkpointing import folder
from pipeline.checkpointing.retention import Retention, best_step
from pipeline.checkpointing.writer import Outcome, Writer
from pipeline.options import UserError

if TYPE_CHECKING:
    from pipeline.evaluation.perplexity import EvalResult
    from pipeline.trainer import Trainer

BEST = "BEST.json"


class Saving(Callback):
    """Saves at the steps that the run's configuration asks for, on a stop, and at the end.

    A save's outcome is known at the next step (asynchronous) or at once; a stop and the end wait
    for it. The best checkpoint is the one with the lowest loss among those whose step was scored on
    `eval_set`, so choose `eval_every` a multiple of `checkpoint_every`.
    """

    phase = "save"

    def __init__(self, identity: Mapping[str, Any], eval_set: str) -> None:
        """`identity` is stored with each checkpoint; see plan.identity."""
        self._identity = dict(identity)
        self._eval_set = eval_set
        self._retention = Retention(0, 1)
        self._scores: dict[int, float] = {}
        self._saved_step = -1
        self._last_good = 0
        self._is_untidy = False
        self._writer: Writer | None = None

    def on_start(self, trainer: Trainer) -> None:
        """What the run goes on from is saved already."""
        self._retention = Retention.of(trainer.config)
        self._writer = Writer(
            trainer.folder.checkpoints,
            trainer.world,
        )
        if trainer.step > 0:
            self._saved_step = self._last_good = trainer.step
        if trainer.world.is_main:
            self._scores = trainer.folder.evaluation_losses(self._eval_set, up_to=trainer.step)
            folder.clear_partial(trainer.folder.checkpoints)
            self._record_unrecorded(trainer)
            self._look_after(trainer, self._begin_folder)

    def on_step(self, trainer: Trainer, record: StepRecord) -> None:
        """Take the outcome of the save under way, if it has ended; save where one is due."""
        self._settle(trainer, self._its_writer.poll())
        if self._is_untidy:
            self._look_after(trainer, self._tidy)
        if self._retention.falls_due(record):
            self._save(trainer)

    def on_rollback(self, trainer: Trainer) -> None:
        """What is being written may be what the run goes back to."""
        self._settle(trainer, self._its_writer.wait())

    def on_rolled_back(self, trainer: Trainer) -> None:
        """What the run goes on from is saved already; what came after it counts no more."""
        self._saved_step = self._last_good = trainer.step
        self._scores = {s: loss for s, loss in self._scores.items() if s <= trainer.step}
        if trainer.world.is_main:
            self._look_after(trainer, self._tidy)

    def on_evaluation(self, trainer: Trainer, result: EvalResult, final: bool) -> None:
        """The score of a checkpoint decides whether it is the best."""
        if trainer.world.is_main and result.eval_set == self._eval_set:
            self._scores[trainer.step] = result.loss
            self._look_after(trainer, self._tidy)

    def on_end(self, trainer: Trainer) -> None:
        """Save the finished model, or where a stopped run stands, so that it goes on from there.

        A save that failed before matters no more when this one succeeds.
        """
        writer = self._its_writer
        self._settle(trainer, writer.wait(), may_fail=True)
        if trainer.step not in (0, self._saved_step):
            self._begin(trainer, background=False)
            self._settle(trainer, writer.wait(), may_fail=False)

    on_stop = on_end

    def on_failure(self, trainer: Trainer) -> None:
        """What is being written beside the training is whole before the process ends."""
        if self._writer is not None:
            self._writer.join()

    @property
    def _its_writer(self) -> Writer:
        if self._writer is None:
            raise RuntimeError("the run has not started")
        return self._writer

    def _save(self, trainer: Trainer) -> None:
        """Begin a save, once the one before it has ended."""
        if trainer.step == self._saved_step:
            return
        self._settle(trainer, self._its_writer.wait())
        self._begin(trainer, background=trainer.config.async_checkpoints)
        if not trainer.config.async_checkpoints:
            self._settle(trainer, self._its_writer.wait())

    def _begin(self, trainer: Trainer, *, background: bool) -> None:
        state = {
            **trainer.record(),
            "identity": self._identity,
            "optimizer": checkpoint.optimizer_scalars(trainer.engine),
        }
        pieces = checkpoint.pieces(trainer.engine, trainer.world)
        self._its_writer.start(pieces, state, background=background)
        self._saved_step = trainer.step

    def _settle(
        self, trainer: Trainer, outcome: Outcome | None, *, may_fail: bool | None = None
    ) -> None:
        """Record how a save ended; a failed one ends the run where it may not."""
        if outcome is None:
            return
        if trainer.world.is_main:
            trainer.folder.note("checkpoints.jsonl", _line(trainer, outcome))
        if not outcome.error:
            self._last_good = outcome.step
            if trainer.world.is_main:
                self._look_after(trainer, self._tidy)
            return
        # The same step may be tried again, by a stop or the end.
        self._saved_step = -1
        last = f"step {self._last_good}" if self._last_good else "its start"
        text = (
            f"checkpoints={str(trainer.folder.checkpoints)!r}: that of step {outcome.step} could "
            f"not be written ({outcome.error}); make room there"
        )
        if may_fail is None:
            may_fail = trainer.config.on_failed_save == "go_on"
        if not may_fail:
            raise UserError(f"{text}, and the same command goes on from {last}")
        trainer.say(f"{text}; the last whole checkpoint is that of {last}, the next is tried")

    def _look_after(self, trainer: Trainer, work: Callable[[Path], object]) -> None:
        """Do `work` on the folder of checkpoints (rank 0), now or after a later step.

        A full disk must not end the run on this rank while the others train.
        """
        checkpoints = trainer.folder.checkpoints
        try:
            work(checkpoints)
            self._is_untidy = False
        except OSError as error:
            if not self._is_untidy:
                trainer.say(
                    f"checkpoints={str(checkpoints)!r}: cannot be tidied ({error.strerror}); it is "
                    "tried again after each step"
                )
            self._is_untidy = True

    def _begin_folder(self, checkpoints: Path) -> None:
        make_folder(checkpoints)
        self._name_best(checkpoints)

    def _tidy(self, checkpoints: Path) -> None:
        """Name the best checkpoint and remove those that need not stay."""
        steps = self._name_best(checkpoints)
        for step in self._retention.superfluous(steps, self._scores):
            # Renamed first: what is half removed must not look like a checkpoint.
            gone = checkpoints / f".step_{step}.removed"
            folder.folder_of(checkpoints, step).rename(gone)
            shutil.rmtree(gone, ignore_errors=True)

    def _name_best(self, checkpoints: Path) -> list[int]:
        """Bring BEST.json up to date; the steps of the whole checkpoints."""
        steps, file = folder.list_steps(checkpoints), checkpoints / BEST
        best = best_step(steps, self._scores)
        if best is None:
            # One that names a checkpoint of weights that the run gave up would mislead.
            file.unlink(missing_ok=True)
            return steps
        record = {"step": best, "eval_set": self._eval_set, "loss": self._scores[best]}
        text = json.dumps(record) + "\n"
        if not file.exists() or file.read_text(encoding="utf-8") != text:
            write_atomically(file, text)
        return steps

    def _record_unrecorded(self, trainer: Trainer) -> None:
        """A kill may have come between a checkpoint's last act and its line."""
        known = set(trainer.folder.completed_checkpoints())
        for step in sorted(set(folder.list_steps(trainer.folder.checkpoints)) - known):
            line = {"step": step, "attempt": trainer.attempt, "event": "saved"}
            trainer.folder.note("checkpoints.jsonl", line)


def _line(trainer: Trainer, outcome: Outcome) -> dict[str, Any]:
    if outcome.error:
        return {
            "step": outcome.step,
            "attempt": trainer.attempt,
            "event": "failed",
            "error": outcome.error,
        }
    return {
        "step": outcome.step,
        "attempt": trainer.attempt,
        "event": "saved",
        "bytes": outcome.bytes,
        "seconds": round(outcome.seconds, 4),
        "blocked_seconds": round(outcome.blocked, 4),
    }

"""The callback: the moments of a run, each a method that does nothing by default."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from pipeline.evaluation.perplexity import EvalResult
    from pipeline.trainer import Trainer


@dataclass(frozen=True)
class StepRecord:
    """What one optimizer step measured, over all ranks."""

    step: int  # steps made, this one included
    loss: float  # nats per target token
    z_loss: float  # mean squared log-normaliser per target token
    grad_norm: float
    lr: float
    seconds: float
    step_tokens: int  # processed in this step
    step_flops: float  # model_causal, of this step
    applied: bool  # False: not finite, skipped
    positions: tuple[int, int]  # the order's positions, first and one past the last
    sample_hash: int
    times: Mapping[str, float]  # seconds of each of pipeline.stopwatch.PARTS
    loss_by_source: Mapping[str, float]  # nats per target token
    is_spike: bool = False  # out of line with the losses before it
    skipped_before: int = 0  # steps in a row up to this one that were skipped


class StopRun(Exception):
    """All ranks agreed to stop while a callback was at work; what the run needs is saved."""


class Callback:
    """Called on every rank in the same order; only rank 0 should write.

    Attributes:
        phase: what the rank's heartbeat says while this one is at work; "" leaves it.
    """

    phase: ClassVar[str] = ""

    def on_start(self, trainer: Trainer) -> None:
        """Before the first step of this attempt."""

    def on_step(self, trainer: Trainer, record: StepRecord) -> None:
        """After each optimizer step."""

    def on_evaluation(self, trainer: Trainer, result: EvalResult, final: bool) -> None:
        """After an evaluation set was scored; `final` for the finished model."""

    def on_rollback(self, trainer: Trainer) -> None:
        """Before the run looks for the checkpoint to go back to."""

    def on_discard(self, trainer: Trainer, record: StepRecord) -> None:
        """When the batch of a step is left out for good."""

    def on_rolled_back(self, trainer: Trainer) -> None:
        """When the run is back at a checkpoint, in an attempt of its own."""

    def on_end(self, trainer: Trainer) -> None:
        """After the last step of the run; not called when the run is stopped before."""

    def on_stop(self, trainer: Trainer) -> None:
        """When all ranks agreed to stop early."""

    def on_failure(self, trainer: Trainer) -> None:
        """When an error ends the attempt, maybe on this rank alone: no collective can be had."""

"""metrics.jsonl, eval.jsonl, ledger.jsonl and TensorBoard, all from the same records."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from pipeline.callbacks.base import Callback, StepRecord
from pipeline.peak import dense_peak

if TYPE_CHECKING:
    from pipeline.evaluation.perplexity import EvalResult
    from pipeline.trainer import Trainer


class Metrics(Callback):
    """A line a step in metrics.jsonl, a line an evaluation in eval.jsonl, both in TensorBoard."""

    def __init__(self) -> None:
        self._peak = 0.0
        self._writer: Any = None

    def on_start(self, trainer: Trainer) -> None:
        """Measure or look up the peak that MFU is a share of."""
        self._peak = dense_peak(trainer.world.device, trainer.config.precision)
        if trainer.world.is_main:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(
                str(trainer.folder.path / "tensorboard"), purge_step=trainer.step + 1
            )

    def on_step(self, trainer: Trainer, record: StepRecord) -> None:
        """Write the step's line."""
        if not trainer.world.is_main:
            return
        seconds = max(record.seconds, 1e-9)
        rate = record.step_flops / seconds / trainer.world.size
        line = {
            "step": record.step,
            "attempt": trainer.attempt,
            "loss": record.loss,
            **trainer.totals.as_record(),
            "grad_norm": record.grad_norm,
            "lr": record.lr,
            "seconds": round(record.seconds, 6),
            "tokens_per_second": round(record.step_tokens / seconds, 1),
            "mfu": round(rate / self._peak, 4),
            "skipped": not record.applied,
            "z_loss": record.z_loss,
        }
        trainer.folder.append("metrics.jsonl", line)
        for key in ("loss", "grad_norm", "lr", "tokens_per_second", "mfu", "z_loss"):
            self._writer.add_scalar(f"train/{key}", line[key], record.step)

    def on_evaluation(self, trainer: Trainer, result: EvalResult, final: bool) -> None:
        """Write the evaluation's line."""
        if not trainer.world.is_main:
            return
        trainer.folder.append(
            "eval.jsonl",
            {
                "step": trainer.step,
                "attempt": trainer.attempt,
                **asdict(result),
                **trainer.totals.as_record(),
                "final": final,
            },
        )
        for key in ("loss", "bits_per_byte"):
            self._writer.add_scalar(f"{result.eval_set}/{key}", getattr(result, key), trainer.step)
        self._writer.flush()

    def on_end(self, trainer: Trainer) -> None:
        """Bring TensorBoard to disk; the last evaluation may still come."""
        if self._writer is not None:
            self._writer.flush()

    on_stop = on_end


class Ledger(Callback):
    """Which samples each step consumed, so that it can be proved afterwards."""

    def on_step(self, trainer: Trainer, record: StepRecord) -> None:
        """Write the step's line."""
        if trainer.world.is_main:
            trainer.folder.append(
                "ledger.jsonl",
                {
                    "step": record.step,
                    "attempt": trainer.attempt,
                    "event": "applied" if record.applied else "skipped",
                    "start": record.positions[0],
                    "end": record.positions[1],
                    "hash": f"{record.sample_hash:016x}",
                },
            )

"""metrics.jsonl, eval.jsonl, ledger.jsonl and TensorBoard, all from the same records."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import psutil
import torch

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
        self._open(trainer)

    def on_rolled_back(self, trainer: Trainer) -> None:
        """Take back what TensorBoard has of the steps that are made again."""
        if self._writer is not None:
            self._try(trainer, self._writer.close)
            self._open(trainer)

    def _open(self, trainer: Trainer) -> None:
        if not trainer.world.is_main:
            return
        from torch.utils.tensorboard import SummaryWriter

        folder, purged = trainer.folder.path / "tensorboard", trainer.step + 1

        def make() -> None:
            self._writer = SummaryWriter(str(folder), purge_step=purged)

        self._try(trainer, make)

    def on_step(self, trainer: Trainer, record: StepRecord) -> None:
        """Write the step's line."""
        if not trainer.world.is_main:
            return
        line = step_line(trainer, record, self._peak)
        trainer.folder.note("metrics.jsonl", line)
        self._plot(trainer, "train", line, record.step)

    def _plot(self, trainer: Trainer, group: str, values: Mapping[str, Any], step: int) -> None:
        """All numbers of `values` as one event, which costs a tenth of an event each."""
        if self._writer is None:
            return
        from tensorboard.compat.proto.summary_pb2 import Summary

        numbers = dict(_numbers(group, values))
        summary = Summary(
            value=[Summary.Value(tag=tag, simple_value=number) for tag, number in numbers.items()]
        )
        self._try(trainer, lambda: self._writer.file_writer.add_summary(summary, step))

    def _try(self, trainer: Trainer, write: Callable[[], object]) -> None:
        """Write to TensorBoard; where there is no room, no more of it in this attempt."""
        try:
            write()
        except OSError as error:
            self._writer = None
            trainer.say(
                f"{trainer.folder.path / 'tensorboard'}: cannot be written ({error.strerror}); "
                "TensorBoard's events end here, metrics.jsonl has them all"
            )

    def on_evaluation(self, trainer: Trainer, result: EvalResult, final: bool) -> None:
        """Write the evaluation's line."""
        if not trainer.world.is_main:
            return
        trainer.folder.note(
            "eval.jsonl",
            {
                "step": trainer.step,
                "attempt": trainer.attempt,
                **asdict(result),
                **trainer.totals.as_record(),
                "final": final,
            },
        )
        scores = {"loss": result.loss, "bits_per_byte": result.bits_per_byte}
        self._plot(trainer, result.eval_set, scores, trainer.step)
        self.on_end(trainer)

    def on_end(self, trainer: Trainer) -> None:
        """Bring TensorBoard to disk; the last evaluation may still come."""
        if self._writer is not None:
            self._try(trainer, self._writer.flush)

    on_stop = on_end


def step_line(trainer: Trainer, record: StepRecord, peak: float) -> dict[str, Any]:
    """What metrics.jsonl says of a step; `peak` is one device's dense FLOP/s.

    Memory and the split of time are this rank's. save_seconds and eval_seconds are those since the
    line before.
    """
    seconds, ranks = max(record.seconds, 1e-9), trainer.world.size
    rate = record.step_tokens / seconds
    line = {
        "step": record.step,
        "attempt": trainer.attempt,
        "loss": record.loss,
        **trainer.totals.as_record(),
        "grad_norm": record.grad_norm,
        "lr": record.lr,
        "seconds": round(record.seconds, 6),
        "tokens_per_second": round(rate, 1),
        "mfu": round(record.step_flops / seconds / ranks / peak, 4),
        "skipped": not record.applied,
        "z_loss": record.z_loss,
        "perplexity": math.exp(min(record.loss, 700.0)),
        "tokens_per_second_per_device": round(rate / ranks, 1),
        **{f"{part}_seconds": round(spent, 6) for part, spent in record.times.items()},
        "save_seconds": round(trainer.beside.pop("Saving", 0.0), 6),
        "eval_seconds": round(trainer.beside.pop("Evaluation", 0.0), 6),
        "rss_bytes": psutil.Process().memory_info().rss,
    }
    if trainer.world.device.type == "cuda":
        line["cuda_peak_bytes"] = torch.cuda.max_memory_allocated(trainer.world.device)
    if record.loss_by_source:
        line["loss_by_source"] = dict(record.loss_by_source)
    return line


def _numbers(group: str, values: Mapping[str, Any]) -> Iterable[tuple[str, float]]:
    """(tag, number) of every number in `values`, those of inner mappings under a longer tag."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _numbers(f"{group}/{key}", value)
        elif isinstance(value, (int, float)) and key != "step" and math.isfinite(value):
            yield f"{group}/{key}", float(value)


class Ledger(Callback):
    """Which samples each step consumed, so that it can be proved afterwards."""

    def on_step(self, trainer: Trainer, record: StepRecord) -> None:
        """Write the step's line."""
        self._write(trainer, record, "applied" if record.applied else "skipped")

    def on_discard(self, trainer: Trainer, record: StepRecord) -> None:
        """The batch is never trained on again: the step will be made with the next one."""
        self._write(trainer, record, "discarded")

    def _write(self, trainer: Trainer, record: StepRecord, event: str) -> None:
        if trainer.world.is_main:
            trainer.folder.note(
                "ledger.jsonl",
                {
                    "step": record.step,
                    "attempt": trainer.attempt,
                    "event": event,
                    "start": record.positions[0],
                    "end": record.positions[1],
                    "hash": f"{record.sample_hash:016x}",
                },
            )

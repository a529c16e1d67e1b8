"""The training loop: one global batch, one optimizer step, and the callbacks beside it."""

from __future__ import annotations

import dataclasses
import signal
import time
from collections.abc import Sequence
from typing import Any

import torch

from pipeline import engine as deepspeed_engine
from pipeline.callbacks.base import Callback, StepRecord, StopRun
from pipeline.config import RunConfig
from pipeline.config_checks import cut
from pipeline.distributed import World, all_agree, sum_over_ranks
from pipeline.guards.heartbeat import Heart
from pipeline.optim.schedule import Schedule
from pipeline.options import UserError
from pipeline.run_folder import RunFolder
from pipeline.sources import Share, Source
from pipeline.step_sums import StepSums
from pipeline.stopwatch import Stopwatch

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


@dataclasses.dataclass
class Totals:
    """Counts since the start of the run, those of its parent included."""

    loss_tokens: int = 0
    processed_tokens: int = 0
    flops_6n: float = 0
    flops_model_causal: float = 0
    flops_model_full: float = 0
    flops_hardware: float = 0
    skipped_steps: int = 0

    def add(self, loss_tokens: int, processed_tokens: int, flops: Sequence[float]) -> None:
        """Count one step; `flops` in the order of the fields."""
        self.loss_tokens += loss_tokens
        self.processed_tokens += processed_tokens
        self.flops_6n += flops[0]
        self.flops_model_causal += flops[1]
        self.flops_model_full += flops[2]
        self.flops_hardware += flops[3]

    def as_record(self) -> dict[str, float]:
        """The counts under the names that the run folder uses."""
        return dataclasses.asdict(self)


class Trainer:
    """One attempt at a run: from its last checkpoint to its end, or to a stop that ranks agreed."""

    def __init__(
        self,
        config: RunConfig,
        world: World,
        engine: Any,
        source: Source,
        folder: RunFolder,
        callbacks: Sequence[Callback],
        *,
        step: int = 0,
        totals: Totals | None = None,
        attempt: int = 1,
        skipped_in_a_row: int = 0,
        heart: Heart | None = None,
    ) -> None:
        self.config = config
        self.world = world
        self.engine = engine
        self.folder = folder
        self.step = step
        self.totals = totals or Totals()
        self.attempt = attempt
        self.heart = heart or Heart()
        self.heart.attempt = attempt
        self._source = source
        self._callbacks = callbacks
        self.beside: dict[str, float] = {}  # seconds spent in each callback, until someone takes it
        self._clock = Stopwatch(world.device)
        self._stop_asked = False
        self.skipped_in_a_row = skipped_in_a_row

    def run(self) -> bool:
        """Train to the last step; False when the run was stopped before (its state is saved)."""
        previous = {
            number: signal.signal(number, lambda *_: self.ask_stop())
            for number in STOP_SIGNALS
            # nohup has a run ignore that its terminal is gone.
            if signal.getsignal(number) != signal.SIG_IGN
        }
        try:
            return self._run()
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _run(self) -> bool:
        try:
            self.notify("on_start")
            while self.step < self.config.steps:
                record = self._train_step()
                self.skipped_in_a_row = 0 if record.applied else self.skipped_in_a_row + 1
                self.notify("on_step", record)
                self._check_skips(record)
            self.notify("on_end")
        except StopRun:
            self.notify("on_stop")
            return False
        except Exception:
            self.notify("on_failure")
            raise
        return True

    def ranks_agree_to_stop(self) -> bool:
        """Whether any rank was asked to stop; called on all ranks together."""
        return not all_agree(not self._stop_asked)

    def epochs(self) -> dict[str, float]:
        """How often each source of data has been gone through."""
        return self._source.epochs(self.step)

    def state(self) -> dict[str, Any]:
        """What a resume needs beside tensors."""
        return {
            "step": self.step,
            "attempt": self.attempt,
            "totals": self.totals.as_record(),
            "cut": cut(self.config, self.world.size),
        }

    def notify(self, moment: str, *details: Any) -> None:
        """Call one method of every callback, in their order."""
        for callback in self._callbacks:
            began, name = time.perf_counter(), type(callback).__name__
            if callback.phase:
                self.heart.begin(callback.phase)
            getattr(callback, moment)(self, *details)
            self.beside[name] = self.beside.get(name, 0.0) + time.perf_counter() - began

    def say(self, text: str) -> None:
        """Tell the user, once."""
        if self.world.is_main:
            print(f"{self.config.name}: {text}", flush=True)

    def ask_stop(self) -> None:
        """Vote to save and leave; from any thread, or a signal's handler."""
        # Only a flag: the ranks must agree on the step they stop at.
        self._stop_asked = True

    def _train_step(self) -> StepRecord:
        """One global batch. Raises StopRun when a rank was asked to stop and all agreed."""
        started = time.perf_counter()
        config, world, engine, clock = self.config, self.world, self.engine, self._clock
        clock.start()
        self.heart.begin_step(self.step, "data")
        share = self._source.share(self.step, world.rank, world.size)
        clock.lap("data")
        self.heart.begin("vote")
        counts = self._sum_counts(share)
        if counts.stop:
            raise StopRun
        self.heart.begin("forward")
        rate = Schedule.of(config)(self.step)
        for group in engine.optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)
        # Dropout is a pure function of (seed, step, rank) and the shapes of the rank's batches: a
        # resume needs no generator state, and draws anew where these are others (`plan.redrawn`).
        torch.manual_seed(hash((config.seed, self.step, world.rank)) % 2**63)
        sums = self._backward(share, counts.target_tokens)
        self.heart.begin("step")
        outcome = deepspeed_engine.step(engine)
        summed = sums.over_ranks(share.flops)
        clock.lap("step")
        start = self.step * config.global_batch
        self.step += 1
        self.totals.add(counts.target_tokens, counts.processed_tokens, summed.flops)
        self.totals.skipped_steps += not outcome.applied
        return StepRecord(
            step=self.step,
            # A batch of nothing but padding behind the split has no target, and no gradient.
            loss=summed.nll / max(1, counts.target_tokens),
            z_loss=summed.squared_z / max(1, counts.target_tokens),
            grad_norm=outcome.grad_norm,
            lr=rate,
            seconds=time.perf_counter() - started,
            step_tokens=counts.processed_tokens,
            step_flops=summed.flops[1],
            applied=outcome.applied,
            positions=(start, start + config.global_batch),
            sample_hash=counts.sample_hash,
            times=clock.read(),
            loss_by_source=summed.loss_by_source,
        )

    def _backward(self, share: Share, target_tokens: int) -> StepSums:
        """Gradients of the mean loss over the global batch's target tokens; this rank's sums.

        DeepSpeed averages gradients over ranks, so each rank's sum is divided by the global number
        of targets and multiplied by the number of ranks: uneven masks weigh as they should.

        A loss that is not finite makes its gradients so, and with them the step is skipped on every
        rank: no weight moves on what was never a number.
        """
        scale = self.world.size / max(1, target_tokens)
        sums, clock = StepSums(self._source.names, self.world.device), self._clock
        clock.lap("step")  # until the ranks agreed to go on
        row = 0
        for batch in share.micro_batches:
            batch = batch.to(self.world.device)
            for terms in self.engine.module.loss_chunks(batch, self.config.z_loss):
                clock.lap("forward")
                self.heart.begin("backward")
                is_finite = (terms.objective.detach() + terms.nll) * 0 + 1  # 1, or else NaN
                deepspeed_engine.backward(self.engine, terms.objective * is_finite * scale)
                sums.add(terms)
                clock.lap("backward")
                self.heart.begin("forward")
            rows = len(batch.targets)
            sums.end_micro_batch(share.row_sources[row : row + rows], batch.loss_mask)
            row += rows
        return sums

    def _sum_counts(self, share: Share) -> _Counts:
        signed = share.sample_hash - 2**64 * (share.sample_hash >= 2**63)
        row = [share.target_tokens, share.processed_tokens, int(self._stop_asked), signed]
        summed = sum_over_ranks(torch.tensor(row, dtype=torch.int64, device=self.world.device))
        targets, processed, stop, hashed = summed.tolist()
        return _Counts(targets, processed, stop > 0, hashed % 2**64)

    def _check_skips(self, record: StepRecord) -> None:
        if not record.applied:
            self.say(f"step {record.step}: loss or gradient is not finite; the step was skipped")
        if self.skipped_in_a_row >= self.config.max_skipped_steps:
            raise UserError(
                f"max_skipped_steps={self.config.max_skipped_steps}: that many steps in a row were "
                f"not finite, up to step {record.step}; lower lr={self.config.lr} and start again"
            )


@dataclasses.dataclass(frozen=True)
class _Counts:
    target_tokens: int
    processed_tokens: int
    stop: bool
    sample_hash: int

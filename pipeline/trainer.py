"""The training loop: one global batch, one optimizer step, and the callbacks beside it."""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence
from typing import Any

import torch

from pipeline import engine as deepspeed_engine
from pipeline.callbacks.base import Callback, StepRecord, StopRun
from pipeline.config import RunConfig
from pipeline.config_checks import cut
from pipeline.distributed import World, all_agree
from pipeline.guards.heartbeat import Heart
from pipeline.guards.rollback import roll_back
from pipeline.guards.verdict import judge
from pipeline.optim.schedule import Schedule
from pipeline.options import UserError
from pipeline.prefetch import Prefetched
from pipeline.run_folder import RunFolder
from pipeline.run_start import RunStart
from pipeline.run_state import RunState, Totals
from pipeline.sources import EndOfData, Share, Source
from pipeline.step_sums import StepSums
from pipeline.stopwatch import Stopwatch
from pipeline.vote import settle

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


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
        state: RunState | None = None,
        attempt: int = 1,
        heart: Heart | None = None,
        start: RunStart | None = None,
    ) -> None:
        self.config = config
        self.world = world
        self.engine = engine
        self.folder = folder
        self.state = state or RunState.of(config)
        self.attempt = attempt
        self.start = start
        self.heart = heart or Heart()
        self.heart.attempt = attempt
        self._source = source
        self._callbacks = callbacks
        self.beside: dict[str, float] = {}  # seconds spent in each callback, until someone takes it
        self._clock = Stopwatch(world.device)
        self._stop_asked = self._is_orphan = False
        self._skipped: list[StepRecord] = []  # the last ones, those of this attempt
        self.end = ""  # why the run ended before its last step

    @property
    def step(self) -> int:
        """Optimizer steps made, skipped ones included."""
        return self.state.step

    @property
    def totals(self) -> Totals:
        """Counts since the start of the run."""
        return self.state.totals

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
            while self.step < self.config.steps and not self.end:
                self._advance()
            self.notify("on_end")
        except StopRun:
            self.notify("on_stop")
            return False
        except Exception:
            self.notify("on_failure")
            raise
        return True

    def _advance(self) -> None:
        """One step and what follows from it."""
        try:
            record = self._train_step()
        except EndOfData as end:
            if self.step == 0:
                raise UserError(f"{end}, before the first step") from end
            self.end = str(end)
            self.say(f"{end}; the run is finished after step {self.step} of {self.config.steps}")
            return
        state = self.state
        state.skipped_in_a_row = 0 if record.applied else state.skipped_in_a_row + 1
        self._skipped = [] if record.applied else [*self._skipped, record]
        verdict = judge(self.config, state, record, self._skipped)
        if record.applied and not record.is_spike:
            state.spikes.add(record.loss)
        if verdict.action == "rollback":
            roll_back(self, verdict.records, verdict.reason)
            self._skipped = []
            return
        if verdict.action == "stop" and record.is_spike and record.applied:
            # Its weights are not saved: the run goes on from before.
            raise UserError(verdict.reason)
        self.notify("on_step", record)
        if not record.applied:
            cause = "its loss is a spike" if record.is_spike else "loss or gradient is not finite"
            self.say(f"step {record.step}: {cause}; the step was skipped")
        if verdict.action == "stop":
            raise UserError(verdict.reason)

    def ranks_agree_to_stop(self) -> bool:
        """Whether any rank was asked to stop; called on all ranks together, now and then."""
        # A long evaluation goes on: it asks this between its batches.
        self.heart.begin(self.heart.phase)
        return not all_agree(not self._must_stop)

    def epochs(self) -> dict[str, float]:
        """How often each source of data has been gone through."""
        return self._source.epochs(self.state.positions.batch(self.step))

    def return_to_start(self) -> dict[str, Any]:
        """Bring the engine back to step 0; the record of it. A collective."""
        assert self.start is not None
        if isinstance(self._source, Prefetched):
            # While it builds a model at ZeRO-3, DeepSpeed has torch make every thread's tensors on
            # the GPU and in the model's numbers: a batch made meanwhile would not be one.
            self._source.close(patience=None)
        return self.start.return_to(self.engine, self.world)

    def record(self) -> dict[str, Any]:
        """What a resume needs beside tensors."""
        return {
            **self.state.as_record(),
            "attempt": self.attempt,
            "cut": cut(self.config, self.world.size),
        }

    def notify(self, moment: str, *details: Any) -> None:
        """Call one method of every callback, in their order."""
        for callback in self._callbacks:
            began, name = time.perf_counter(), type(callback).__name__
            if callback.phase and moment != "on_failure":
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

    def leave_as_orphan(self) -> None:
        """As `ask_stop`, since this rank's launcher is gone: nobody's wish."""
        self._is_orphan = True

    @property
    def _must_stop(self) -> bool:
        return self._stop_asked or self._is_orphan

    def was_wished(self) -> bool:
        """Whether somebody asked any rank for the stop that was made; a collective."""
        return not all_agree(not self._stop_asked)

    def _train_step(self) -> StepRecord:
        """One global batch. Raises StopRun when a rank was asked to stop and all agreed."""
        started = time.perf_counter()
        config, world, engine, clock = self.config, self.world, self.engine, self._clock
        clock.start()
        self.heart.begin_step(self.step, "data")
        share = self._read()
        clock.lap("data")
        self.heart.begin("vote")
        counts = settle(share, stop=self._must_stop, world=world)
        assert isinstance(share, Share)
        self.heart.begin("forward")
        rate = Schedule.of(config)(self.step)
        for group in engine.optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)
        # Dropout is a pure function of (seed, step, rank) and the shapes of the rank's batches: a
        # resume needs no generator state, and draws anew where these are others (`plan.redrawn`).
        torch.manual_seed(hash((config.seed, self.step, world.rank)) % 2**63)
        sums = self._backward(share, counts.target_tokens)
        self.heart.begin("step")
        # A batch of nothing but padding behind the split has no target, and no gradient.
        targets, spikes = max(1, counts.target_tokens), self.state.spikes
        summed = None
        if config.loss_spikes == "skip":
            # Before the step, at the price of waiting for the losses.
            summed = sums.over_ranks(share.flops)
            if spikes.is_spike(summed.nll / targets):
                self._spoil(share)
        outcome = deepspeed_engine.step(engine)
        summed = summed or sums.over_ranks(share.flops)
        clock.lap("step")
        positions = self.state.positions.span(self.step)
        self.state.step += 1
        self.totals.add(counts.target_tokens, counts.processed_tokens, summed.flops)
        self.totals.skipped_steps += not outcome.applied
        return StepRecord(
            step=self.step,
            loss=summed.nll / targets,
            z_loss=summed.squared_z / targets,
            grad_norm=outcome.grad_norm,
            lr=rate,
            seconds=time.perf_counter() - started,
            step_tokens=counts.processed_tokens,
            step_flops=summed.flops[1],
            applied=outcome.applied,
            positions=positions,
            sample_hash=counts.sample_hash,
            times=clock.read(),
            loss_by_source=summed.loss_by_source,
            is_spike=spikes.is_spike(summed.nll / targets),
            skipped_before=self.state.skipped_in_a_row,
        )

    def _read(self) -> Share | Exception:
        """This rank's part of the next batch, or why there is none: the ranks must hear of it."""
        batch, most = self.state.positions.batch(self.step), self.config.max_epochs
        try:
            if most is not None:
                epochs = self._source.epochs(batch + 1)
                name = max(epochs, key=lambda each: epochs[each])
                if epochs[name] > most:
                    return EndOfData(
                        f"max_epochs={most:g}: the next batch would exceed it in {name}"
                    )
            return self._source.share(batch, self.world.rank, self.world.size)
        except Exception as error:
            return error

    def _spoil(self, share: Share) -> None:
        """Have the step that is due skipped, by the way of a gradient that is not finite."""
        batch = share.micro_batches[0].to(self.world.device)
        for terms in self.engine.module.loss_chunks(batch, self.config.z_loss):
            deepspeed_engine.backward(self.engine, terms.objective * float("nan"))

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

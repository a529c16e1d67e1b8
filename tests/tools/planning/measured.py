"""Real steps of real engines on CPU ranks, or an engine that only pretends to be one of many."""

from __future__ import annotations

import contextlib
import gc
import os
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from models.config import named
from models.registry import architecture
from tests.distributed.harness import run_ranks
from tools.planning.request import Request

if TYPE_CHECKING:
    from pipeline.config import RunConfig
    from pipeline.run_folder import RunFolder


@dataclass(frozen=True)
class Case:
    """One way to train."""

    arch: str
    size: str
    stage: int = 3
    precision: str = "fp32"
    optimizer: str = "adamw"
    rows: int = 2
    backward_calls: int = 1
    seq_len: int = 64
    vocab_size: int = 2048
    model: tuple[tuple[str, Any], ...] = ()
    run: tuple[tuple[str, Any], ...] = ()
    zero: tuple[tuple[str, Any], ...] = ()
    evaluated: int = 0
    """Held-out sequences that a rank scores at once after the second step; 0: none."""
    saves: bool = False
    """Whether that step's state is being written, from a copy, then and in the third step."""

    def __str__(self) -> str:
        more = [f"{key}={value}" for key, value in self.model + self.run + self.zero]
        shape = f"{self.rows}x{self.backward_calls}x{self.seq_len}"
        more += [f"evaluated={self.evaluated}"] * bool(self.evaluated) + ["saves"] * self.saves
        named_ = [self.arch, self.size, f"zero{self.stage}", self.precision, self.optimizer, shape]
        return "-".join([*named_, *more])

    def section(self) -> dict[str, Any]:
        """Of the DeepSpeed file: small buckets, as cpu.json has."""
        found: dict[str, Any] = {"stage": self.stage}
        if self.stage:
            found |= {"contiguous_gradients": True, "reduce_bucket_size": 200_000}
        if self.stage == 3:
            found |= {
                "stage3_prefetch_bucket_size": 100_000,
                "stage3_param_persistence_threshold": 1_000,
                "stage3_max_live_parameters": 400_000,
                "stage3_max_reuse_distance": 400_000,
            }
        return found | dict(self.zero)

    def config(self, ranks: int) -> RunConfig:
        """As a run."""
        from pipeline.config import RunConfig

        return RunConfig(
            run_dir="unused",
            data="unused",
            arch=self.arch,  # type: ignore[arg-type]
            size=self.size,
            model=dict(self.model),
            steps=3 if self.evaluated else 2,
            eval_every=2 * bool(self.evaluated),
            checkpoint_every=2 * self.saves,
            seq_len=self.seq_len,
            global_batch=ranks * self.rows * self.backward_calls,
            micro_batch=self.rows,
            optimizer=self.optimizer,  # type: ignore[arg-type]
            precision=self.precision,  # type: ignore[arg-type]
            ds_config="unused",
            threads=1,
            **dict(self.run),
        )

    def request(self, ranks: int) -> Request:
        """As a plan is asked about it."""
        run = dict(self.run)
        split = self.seq_len // 2
        overrides = {"max_seq_len": self.seq_len, **dict(self.model)}
        return Request(
            model=named(self.arch, self.size, self.vocab_size, **overrides),
            optimizer=self.optimizer,
            precision=self.precision,
            zero=self.section(),
            ranks=ranks,
            micro_batch=self.rows,
            backward_calls=self.backward_calls,
            seq_len=self.seq_len,
            source=split if architecture(self.arch).encodes_prefix else 0,
            split=split,
            evaluated=self.evaluated,
            copies_saves=self.saves,
            factored=run.get("factored", False),
            momentum=run.get("beta1", 0.0) > 0,
            on_cpu=True,
        )


@dataclass
class Measured:
    """Bytes of live tensors on rank 0."""

    built: int = 0
    """After the engine was made."""
    peak: int = 0
    """The most from the second step on, when every state is there."""
    kept: int = 0
    """After the last step."""
    steps: list[int] = field(default_factory=list)


def measure(cases: Sequence[Case], ranks: int, timeout: float = 240) -> list[Measured]:
    """Each case's steps under the trainer, one after the other on the same ranks."""
    return run_ranks(_measure_all, ranks, list(cases), ranks, False, timeout=timeout)[0]


def pretend(cases: Sequence[Case], ranks: int, timeout: float = 60) -> list[Measured]:
    """Each case's engine as rank 0 of `ranks` of which there is no other; no step, and no number is
    written: what any size allocates is told by a process of 300 MB.

    Each in a process of its own, within `timeout` seconds: DeepSpeed keeps every module that it was
    given, and looking through them all for what can go would soon take most of the time.
    """
    return [
        run_ranks(_measure_all, 1, [case], ranks, True, timeout=timeout)[0][0] for case in cases
    ]


def _measure_all(cases: list[Case], ranks: int, is_fake: bool) -> list[Measured]:
    if is_fake:
        import torch.distributed as dist
        from torch.testing._internal.distributed.fake_pg import FakeStore

        from pipeline import zero_layout

        dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
        os.environ.update(WORLD_SIZE=str(ranks), LOCAL_SIZE=str(ranks))
        # Pretended messages are copied all the same, which takes a pass over every number.
        done = SimpleNamespace(wait=lambda: None)
        dist.broadcast = dist.all_gather_into_tensor = lambda *given, **options: done
        # Nobody answers: the other ranks' parts are not there to be counted.
        zero_layout.check_cover = lambda found: None
    from pipeline import distributed

    world = distributed.start(timeout_seconds=100, threads=1)
    return [_measure(case, case.config(ranks), world, steps=not is_fake) for case in cases]


def _measure(case: Case, config: RunConfig, world: Any, *, steps: bool) -> Measured:
    from pipeline.assemble import make_engine
    from pipeline.trainer import Trainer
    from tests.models.live_storages import LiveStorages
    from tests.tools.planning.untouched import Untouched

    found = Measured()
    # Before the first step, the collector frees what only cycles hold.
    gc.collect()
    # Among ranks that are not there, what tensors hold is nothing anyway.
    untouched = contextlib.nullcontext() if steps else Untouched()
    with untouched, LiveStorages() as live:
        engine = make_engine(config, case.vocab_size, {"zero_optimization": case.section()})
        gc.collect()
        found.built = live.bytes
        if steps:
            source = _Noise(case, live, found)
            with _callbacks(case, source) as (folder, callbacks):
                Trainer(config, world, engine, source, folder, callbacks).run()
                callbacks.clear()
            gc.collect()
            found.peak, found.kept = live.peak, live.bytes
        engine.destroy()
    del engine
    gc.collect()
    return found


@contextlib.contextmanager
def _callbacks(case: Case, source: _Noise) -> Iterator[tuple[RunFolder, list[Any]]]:
    """A run's own evaluation and saving, where `case` has them. The save is not written before the
    third step is over: until then its copy is there, however quick the disk is."""
    import torch.distributed as dist

    from pipeline.callbacks.base import Callback
    from pipeline.callbacks.evaluation import Evaluation
    from pipeline.callbacks.saving import Saving
    from pipeline.checkpointing import writer
    from pipeline.evaluation.perplexity import EvalSet
    from pipeline.run_folder import RunFolder

    if not case.evaluated:
        yield RunFolder("unused"), []
        return
    batch = source.batch(case.evaluated, first_scored=case.seq_len // 2)
    scores = Evaluation([EvalSet("held-out", [batch], 1, 1, 0.0)], set())
    write, is_over = writer.write_tensors, threading.Event()

    def write_late(*args: Any) -> Any:
        assert is_over.wait(60)
        return write(*args)

    class ThirdStep(Callback):
        def on_step(self, trainer: Any, record: Any) -> None:
            if record.step == 3:
                is_over.set()

    writer.write_tensors = write_late
    try:
        with tempfile.TemporaryDirectory() as found:
            place = [found]
            # All ranks write to one folder.
            dist.broadcast_object_list(place, src=0)
            saving = [Saving({}, "held-out")] if case.saves else []
            yield RunFolder(Path(place[0])), [*saving, scores, ThirdStep()]
            dist.barrier()
    finally:
        writer.write_tensors = write


class _Noise:
    """Random tokens; a new peak is counted from the second step on."""

    names: tuple[str, ...] = ()

    def __init__(self, case: Case, live: Any, found: Measured) -> None:
        self._case, self._live, self._found = case, live, found

    def batch(self, rows: int, *, first_scored: int = 0) -> Any:
        import torch

        from models.batch import Batch

        case = self._case
        ids = torch.randint(case.vocab_size, (rows, case.seq_len))
        scored = torch.ones_like(ids, dtype=torch.bool)
        scored[:, :first_scored] = False
        encoder = None
        if architecture(case.arch).encodes_prefix:
            half = case.seq_len // 2
            encoder, ids, scored = ids[:, :half].clone(), ids[:, half:].clone(), scored[:, half:]
        return Batch(ids, ids.clone(), scored, encoder_ids=encoder)

    def share(self, step: int, rank: int, world_size: int) -> Any:
        from models.flops import Flops
        from pipeline.sources import Share

        case = self._case
        gc.collect()
        if step == 1:
            self._live.peak = self._live.bytes
        batches = [self.batch(case.rows) for _ in range(case.backward_calls)]
        targets = sum(int(batch.loss_mask.sum()) for batch in batches)
        return Share(batches, targets, targets, Flops(0.0, 0.0, 0.0, 0.0), 0)

    def epochs(self, step: int) -> dict[str, float]:
        return {}

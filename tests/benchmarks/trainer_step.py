"""The trainer's step on one ZeRO-3 rank against the bare loop that DeepSpeed's own examples show.

What the trainer adds to a step is what is measured: reading and hashing its samples, agreeing on a
stop, counting FLOPs, metrics, ledger and TensorBoard, heartbeats, and every callback that a run has
(no step that is timed saves or evaluates). It is `pretrain.py` itself, with one callback more that
reads the clock. The bare loop has its batches ready. Ranks are forked with everything imported;
start-up, the first steps and the end are not counted.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

from tests.benchmarks.measure import Benchmark, Contest, Sample, UnequalWork
from tests.benchmarks.text import make_corpus, make_tokenizer
from tests.distributed.entry import argv, train
from tests.distributed.harness import run_ranks
from tools.cli import dispatch

WARM_UP, STEPS = 3, 12
VOCAB_SIZE, SEQ_LEN, BATCH, SIZE = 4096, 128, 16, "mini"
RELATIVE_TOLERANCE = 1e-5


def run_flags(folder: Path, data: Path) -> dict[str, Any]:
    """A run of the demo's largest size."""
    return {
        "run_dir": folder,
        "data": data,
        "name": "bench",
        "arch": "decllm",
        "size": SIZE,
        "seq_len": SEQ_LEN,
        "steps": WARM_UP + STEPS,
        "global_batch": BATCH,
        "schedule": "constant",
        "precision": "fp32",
        "ds_config": Path(__file__).parents[2] / "ds_configs" / "cpu.json",
        "eval_sequences": BATCH,
        "threads": 1,
    }


class _Clock:
    """Losses, and CPU-seconds from the end of the warm-up on."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self._began = 0.0
        self.cpu_seconds = 0.0

    def step_done(self, loss: float) -> None:
        self.losses.append(loss)
        if len(self.losses) == WARM_UP:
            self._began = time.process_time()
        self.cpu_seconds = time.process_time() - self._began


def trainer_rank(flags: dict[str, Any]) -> tuple[float, list[float]]:
    """This rank trains with the trainer; CPU-seconds of STEPS steps, and all losses."""
    from pipeline import trainer
    from pipeline.callbacks.base import Callback, StepRecord

    clock = _Clock()

    class Watch(Callback):
        def on_step(self, trainer: trainer.Trainer, record: StepRecord) -> None:
            clock.step_done(record.loss)

    class Watched(trainer.Trainer):
        """Its clock is read after all that the run itself does in a step."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._callbacks = [*self._callbacks, Watch()]

    trainer.Trainer = Watched  # type: ignore[misc]
    problem = train(argv(flags))
    if problem:
        raise RuntimeError(problem)
    return clock.cpu_seconds, clock.losses


def bare_rank(flags: dict[str, Any]) -> tuple[float, list[float]]:
    """This rank trains with nothing but DeepSpeed's engine; as `trainer_rank`."""
    import deepspeed
    import torch

    from models.batch import Batch
    from models.registry import build
    from pipeline import distributed
    from pipeline.config import RunConfig
    from pipeline.deepspeed_file import read_deepspeed_file
    from pipeline.optim.build import build_optimizer
    from pipeline.options import load
    from pipeline.plan import resolve_model
    from pipeline.pretrain import open_data

    config = load(RunConfig, {name: str(value) for name, value in flags.items()})
    distributed.start(timeout_seconds=config.collective_timeout, threads=1)
    order, _ = open_data(config)
    info = order.store.manifest.tokenizer
    batches = []
    for step in range(config.steps):
        targets = torch.from_numpy(order.batch(step * BATCH, BATCH).ids.astype("int64"))
        begin = torch.full((BATCH, 1), info.special_ids["bos"])
        mask = torch.ones(BATCH, SEQ_LEN, dtype=torch.bool)
        batches.append(Batch(torch.cat([begin, targets[:, :-1]], 1), targets, mask))
    torch.manual_seed(config.seed)
    model = build(resolve_model(config, info.vocab_size))
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=build_optimizer(model, config),
        config={
            **read_deepspeed_file(config.ds_config),
            "train_micro_batch_size_per_gpu": BATCH,
            "gradient_clipping": config.grad_clip,
            "zero_allow_untested_optimizer": True,
        },
        dist_init_required=False,
    )
    clock = _Clock()
    for batch in batches:
        terms = engine(batch, config.z_loss)
        engine.backward(terms.objective / batch.targets.numel())
        engine.step()
        clock.step_done(float(terms.nll) / batch.targets.numel())
    return clock.cpu_seconds, clock.losses


def contest(folder: Path) -> Contest:
    """See `BENCHMARKS`."""
    corpus = make_corpus(folder, 1_000_000)
    model, data = make_tokenizer(folder, corpus, VOCAB_SIZE), folder / "data"
    flags: dict[str, Any] = {
        "input": corpus,
        "output": data,
        "tokenizer": model,
        "block_tokens": 2048,
    }
    flags["validation_fraction"] = 0.1
    dispatch(["tokenize", *(f"--{name}={value}" for name, value in flags.items())])
    numbers = count()

    def side(rank: Callable[[Any], tuple[float, list[float]]]) -> Sample:
        flags = run_flags(folder / f"run-{next(numbers)}", data)
        ((cpu_seconds, losses),) = run_ranks(rank, 1, flags, timeout=300)
        return Sample(cpu_seconds / STEPS, losses)

    return Contest(
        ours=lambda: side(trainer_rank),
        theirs=lambda: side(bare_rank),
        check=same_losses,
        work=BATCH * SEQ_LEN,
        unit="tok",
    )


def same_losses(ours: list[float], theirs: list[float]) -> None:
    """Every step's loss agrees within RELATIVE_TOLERANCE."""
    close = [abs(a - b) <= RELATIVE_TOLERANCE * b for a, b in zip(ours, theirs, strict=True)]
    if len(ours) != WARM_UP + STEPS or not all(close):
        raise UnequalWork(f"losses differ: {ours} against {theirs}")


BENCHMARKS = (
    Benchmark(
        name="trainer-step",
        ours="pretrain.py: samples read and hashed, metrics written, every callback and guard",
        theirs="a bare DeepSpeed loop over ready batches: forward, backward, step",
        process="forked ranks",
        prepare=contest,
        note=f"1 rank, ZeRO-3 (cpu.json), decllm {SIZE}, batch {BATCH}x{SEQ_LEN}, V {VOCAB_SIZE}; "
        "the trainer's overhead is 1/ratio - 1",
    ),
)

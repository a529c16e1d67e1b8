"""Feeding when nothing is in memory: the page cache dropped, and the first batch after a resume."""

from __future__ import annotations

import contextlib
import os
import random
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from tests.benchmarks import feeding
from tests.benchmarks.measure import (
    Benchmark,
    Contest,
    NotRun,
    Sample,
    UnequalWork,
    in_fresh_process,
    timed,
)

_PATIENCE = 20.0  # seconds
_LOOKS = 64  # places of a file where it is seen whether it is in memory

Epochs = Callable[[int], Iterator[np.ndarray]]


def drop_page_cache(folder: Path) -> None:
    """Forget every file below `folder`; nothing may have them mapped.

    Raises:
        NotRun: they are in memory all the same.
    """
    deadline = time.monotonic() + _PATIENCE
    for path in folder.rglob("*"):
        while path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())  # what is not on disk yet cannot be forgotten
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                share = _in_memory(file.fileno())
            if share < 0.1:
                break
            if time.monotonic() > deadline:
                raise NotRun(
                    f"the page cache cannot be dropped here: {share:.0%} of {path.name} stays"
                )
            time.sleep(0.2)  # a process that had it mapped may still be ending


def _in_memory(handle: int) -> float:
    size = os.fstat(handle).st_size
    here = 0
    # In no order that the kernel would read ahead of.
    for place in random.Random(0).sample(range(_LOOKS), _LOOKS):
        # What would have to be waited for is not in memory: it is not counted.
        with contextlib.suppress(BlockingIOError):
            os.preadv(handle, [bytearray(1)], size * place // _LOOKS, os.RWF_NOWAIT)
            here += 1
    return here / _LOOKS if size > 1 << 20 else 0.0


SIDES: dict[str, Callable[[Path], Epochs]] = {
    "isoflop": feeding.training_order,
    "webdataset": feeding.webdataset_pipeline,
    "litdata": feeding.litdata_epochs,
}


def run_epoch(name: str, folder: Path, number: int) -> tuple[float, int]:
    """CPU-seconds and sequences of an epoch of one side, in this process."""
    epoch = SIDES[name](folder)
    sample = timed(lambda: sum(len(batch) for batch in epoch(number)))
    return sample.cpu_seconds, sample.result


def cold_contest(folder: Path, peer: str) -> Contest:
    """Whole epochs over files that are not in memory, each in a process that maps them anew."""
    if find_spec(peer) is None:
        raise NotRun(f"{peer} is not installed; pip install {peer}")
    feeding.make_shards(folder)
    if peer == "litdata":
        in_fresh_process(feeding.write_litdata, folder)
    numbers = iter(range(1 << 30))
    expected = feeding.BLOCKS * feeding.BLOCK_TOKENS // feeding.SEQ_LEN

    def side(name: str) -> Sample:
        drop_page_cache(folder)
        return Sample(*in_fresh_process(run_epoch, name, folder, next(numbers)))

    def check(ours: int, theirs: int) -> None:
        if not ours == theirs == expected:
            raise UnequalWork(f"{ours} and {theirs} sequences, {expected} expected")

    return Contest(
        ours=lambda: side("isoflop"),
        theirs=lambda: side(peer),
        check=check,
        work=expected * feeding.SEQ_LEN / 1e6,
        unit="Mtok",
    )


def resume_contest(folder: Path) -> Contest:
    """The first batch at a position deep in the epoch, both sides opened anew."""
    from pipeline.data.loader import SequenceStore, TrainingOrder

    if find_spec("webdataset") is None:
        raise NotRun("webdataset is not installed; pip install webdataset")
    feeding.make_shards(folder)
    total = feeding.BLOCKS * feeding.BLOCK_TOKENS // feeding.SEQ_LEN // feeding.BATCH
    never_stopped = feeding.training_order(folder)
    draw = random.Random(0)

    def ours() -> Sample:
        # In any epoch; theirs would have to replay those before, too.
        step = draw.randrange(1000 * total)

        def work() -> Any:
            order = TrainingOrder(SequenceStore(folder, "train", feeding.SEQ_LEN), seed=0)
            return order.batch(step * feeding.BATCH, feeding.BATCH).ids.astype(np.int64)

        sample = timed(work)
        batches = never_stopped(step // total)
        for _ in range(step % total):
            next(batches)
        if not np.array_equal(sample.result, next(batches)):
            raise UnequalWork(f"step {step}: not the batch of a run that never stopped")
        return Sample(sample.cpu_seconds, sample.result.shape)

    def theirs() -> Sample:
        step = total // 2

        def work() -> Any:
            batches = feeding.webdataset_pipeline(folder)(0)
            for _ in range(step):
                next(batches)
            return next(batches)

        sample = timed(work)
        return Sample(sample.cpu_seconds, sample.result.shape)

    def check(one: Any, other: Any) -> None:
        if one != other:
            raise UnequalWork(f"batches of {one} and {other}")

    return Contest(ours=ours, theirs=theirs, check=check)


_OURS = "TrainingOrder: epoch-wide permutation, read-ahead, every read verified"
BENCHMARKS = (
    Benchmark(
        name="feeding-cold",
        ours=_OURS,
        theirs="webdataset: blocks through a 10,000-sequence shuffle buffer, nothing verified",
        process="fresh processes",
        prepare=lambda folder: cold_contest(folder, "webdataset"),
        note="page cache dropped before each run; CPU-seconds, waiting for the disk not counted",
    ),
    Benchmark(
        name="feeding-litdata-cold",
        ours=_OURS,
        theirs="litdata: TokensLoader, chunks shuffled, nothing verified",
        process="fresh processes",
        prepare=lambda folder: cold_contest(folder, "litdata"),
        peer=True,
        note="as feeding-cold",
    ),
    Benchmark(
        name="feeding-resume",
        ours="TrainingOrder: opened anew, first batch at a random step of 1,000 epochs",
        theirs="webdataset: opened anew, the first half of one epoch read and dropped",
        process="one process",
        prepare=resume_contest,
        note="page cache warm; ours is compared with a run that never stopped",
    ),
)

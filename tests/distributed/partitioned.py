"""A model built in slices by one rank of many that are only pretended, and what it takes."""

from __future__ import annotations

import dataclasses
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.distributed.harness import run_ranks


@dataclass(frozen=True)
class Built:
    """What rank 0 held, in bytes.

    Attributes:
        slices: of all parameters, as stored.
        expected: the same from shapes alone: ceil(n / ranks) elements of each parameter.
        masters: fp32 masters that the engine made of them.
        whole: one full copy of the model.
        largest: the largest single parameter, whole.
        states: what the optimizer keeps from its start (Adafactor; others make it in a step).
        peak: growth of the process's resident memory at its highest.
    """

    slices: int
    expected: int
    masters: int
    whole: int
    largest: int
    states: int
    peak: int


def build_as_one_of(
    ranks: int, arch: str, size: str, *, precision: str, draw: bool, **run: Any
) -> Built:
    """Build a named model and its engine as rank 0 of `ranks`, in a process of its own.

    Args:
        draw: whether first values are drawn; what is held does not depend on them.
        run: fields of the run.
    """
    return run_ranks(_build, 1, ranks, arch, size, precision, draw, run, timeout=280)[0]


class _Peak(threading.Thread):
    """Watches this process's resident memory."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._process = psutil.Process()
        self._over = threading.Event()
        self.start_bytes = self.bytes = self._process.memory_info().rss

    def run(self) -> None:
        while not self._over.wait(0.005):
            self.bytes = max(self.bytes, self._process.memory_info().rss)

    def stop(self) -> int:
        self._over.set()
        self.join()
        return self.bytes - self.start_bytes


def _build(
    ranks: int, arch: str, size: str, precision: str, draw: bool, run: dict[str, Any]
) -> Built:
    import torch
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    os.environ.update(WORLD_SIZE=str(ranks), LOCAL_SIZE=str(ranks))
    from models import layers
    from models.config import named
    from models.registry import build
    from pipeline import distributed, engine, zero_layout
    from pipeline.optim.build import bind_optimizer, build_optimizer
    from tests.distributed.parity import Case, run_config

    distributed.start(timeout_seconds=100, threads=1)
    if not draw:
        # Drawing 8e9 values takes a minute.
        layers.draw_normal = lambda weight, std: None
    case = Case(arch, 3, micro_batch=1, precision=precision)
    config = dataclasses.replace(run_config(case, Path(), 2), global_batch=ranks, **run)
    peak = _Peak()
    peak.start()
    built = engine.build_engine(
        lambda: build(named(arch, size, vocab_size=32_768)),
        lambda model: build_optimizer(model, config),
        config,
        case.deepspeed_file(),
    )
    highest = peak.stop()
    # Nobody answers: the other ranks' parts are not there to be counted.
    zero_layout.check_cover = lambda found: None
    bind_optimizer(built)
    masters = list(zero_layout.flat_tensors(built))
    kept = [t for flat in masters for t in zero_layout.client_optimizer(built).state[flat].values()]
    parameters = list(built.module.parameters())
    width = 2 if precision == "bf16" else 4
    return Built(
        slices=sum(p.ds_tensor.numel() * p.ds_tensor.element_size() for p in parameters),
        expected=sum(-(-p.ds_numel // ranks) * width for p in parameters),
        masters=sum(flat.numel() * flat.element_size() for flat in masters),
        whole=sum(p.ds_numel * width for p in parameters),
        largest=max(p.ds_numel for p in parameters) * width,
        states=sum(t.numel() * t.element_size() for t in kept if torch.is_tensor(t)),
        peak=highest,
    )

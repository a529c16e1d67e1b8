"""The one place that starts DeepSpeed and collectives.

What was learnt the hard way is kept here: the shared-memory op that DeepSpeed would compile (and
wait for without end if a killed run left its lock) is never built, collectives have time-outs, one
rank takes its share of the cores, and DeepSpeed's own chatter is silenced while warnings stay.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import warnings
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from pipeline.network import choose_interfaces, free_port


@dataclass(frozen=True)
class World:
    """Who this process is among the ranks."""

    rank: int
    size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this rank writes the run folder."""
        return self.rank == 0


def start(*, timeout_seconds: int, threads: int) -> World:
    """Join the other ranks; without a launcher, be the only one.

    Args:
        timeout_seconds: after this long a collective that not all ranks joined raises.
        threads: CPU threads of this rank; 0 is its share of the cores.

    Raises UserError where no interface of this host leads to the other hosts.
    """
    gpu = torch.cuda.is_available()
    if not gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_SIZE="1")
    if os.environ["WORLD_SIZE"] == "1":
        # Nobody has to find it: another program may have the port that a launcher gave.
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    choose_interfaces(os.environ)
    local_size = int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or 1)
    torch.set_num_threads(threads or max(1, (os.cpu_count() or 1) // local_size))
    import deepspeed

    _quieten()
    # None of its ops is asked for here; else it would try them all out with a compiler.
    deepspeed.ops.__compatible_ops__ = {}
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local_rank) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
        import_muon_as_written()
    timeout = timedelta(seconds=timeout_seconds)
    # DeepSpeed makes groups of its own, ZeRO's among them, and gives them no time-out: torch's
    # default is half an hour.
    dist.distributed_c10d.default_pg_timeout = timeout
    dist.distributed_c10d.default_pg_nccl_timeout = timeout
    deepspeed.init_distributed(
        dist_backend="nccl" if gpu else "gloo", timeout=timeout, verbose=False
    )
    # What is imported stays: collections need not look at it, DeepSpeed's own among them, which it
    # makes in building an engine.
    gc.freeze()
    return World(dist.get_rank(), dist.get_world_size(), local_rank, device)


def import_muon_as_written() -> None:
    """Import DeepSpeed's Muon without compiling its kernels, which a CPU gains nothing from.

    DeepSpeed 0.19.8 asks of every optimizer whether it is its Muon. That import alone would load
    torch.compile's whole compiler, some three seconds of a rank's start; the first step of a Muon
    would take a C++ compiler and half a minute a shape.
    """
    from deepspeed.runtime import compiler

    compile = compiler.compile
    compiler.compile = lambda *_, **__: lambda kernel: kernel
    try:
        import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
    finally:
        compiler.compile = compile


def device_kind() -> str:
    """The kind of device that this rank trains on, for nodes to compare."""
    if not torch.cuda.is_available():
        return "cpu"
    name = torch.cuda.get_device_name(int(os.environ.get("LOCAL_RANK", "0")))
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    return f"{name}, CUDA {torch.version.cuda}, NCCL {nccl}"


def keep_freed_memory() -> None:
    """Have glibc keep what a step frees, for the next step, instead of giving it to the kernel.

    By default blocks above a moving threshold of at most 32 MiB are mapped anew, and zeroed page by
    page, each time they are asked for. Nothing happens where the C library is another.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, mmap_threshold = -1, -3  # malloc.h
        mallopt(mmap_threshold, 32 << 20)
        mallopt(trim_threshold, 1 << 30)


# DeepSpeed warns of what is as it should be here: an optimizer of ours, bound to ZeRO's layout.
_NOISE = ("You are using ZeRO with an untested optimizer",)


def _quieten() -> None:
    from deepspeed.runtime import bf16_optimizer
    from deepspeed.utils import logger

    # Printed, not logged, several times in building an engine.
    bf16_optimizer.see_memory_usage = _say_nothing
    logger.setLevel(logging.WARNING)
    logger.addFilter(_is_no_noise)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    # A page for each that a compiled model calls; ours are pure functions.
    warnings.filterwarnings("ignore", message="Dynamo detected a call to a `functools.lru_cache`")


def _say_nothing(message: str, force: bool = False) -> None:
    """In the place of DeepSpeed's report of its memory."""


def _is_no_noise(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    return not any(noise in message for noise in _NOISE)


def stop() -> None:
    """Leave the other ranks cleanly."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """`values` summed over the ranks, in place; int64 wraps modulo 2**64.

    What lies in host memory (offloaded, or a flag) goes by way of the GPU where NCCL sums.
    """
    if values.device.type == "cpu" and dist.get_backend() == "nccl":
        on_device = values.cuda()
        dist.all_reduce(on_device, op=dist.ReduceOp.SUM)
        return values.copy_(on_device)
    dist.all_reduce(values, op=dist.ReduceOp.SUM)
    return values


def same_everywhere(value: object) -> Any:
    """Rank 0's `value`, on every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def all_agree(ok: bool) -> bool:
    """Whether `ok` holds on every rank."""
    return int(sum_over_ranks(torch.tensor([0 if ok else 1], dtype=torch.int64))) == 0


def barrier() -> None:
    """Wait for every rank."""
    dist.barrier()

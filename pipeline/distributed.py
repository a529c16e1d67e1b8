"""The one place that starts DeepSpeed and collectives.

What was learnt the hard way is kept here: the shared-memory op that DeepSpeed would compile (and
wait for without end if a killed run left its lock) is never built, collectives have time-outs, one
rank takes its share of the cores, and DeepSpeed's own chatter is silenced while warnings stay.
"""

from __future__ import annotations

import logging
import os
import warnings
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from pipeline.network import free_port


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
    """
    gpu = torch.cuda.is_available()
    if not gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_SIZE="1")
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", str(free_port()))
    local_size = int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or 1)
    torch.set_num_threads(threads or max(1, (os.cpu_count() or 1) // local_size))
    import deepspeed

    _quieten()
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local_rank) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    deepspeed.init_distributed(
        dist_backend="nccl" if gpu else "gloo",
        timeout=timedelta(seconds=timeout_seconds),
        verbose=False,
    )
    return World(dist.get_rank(), dist.get_world_size(), local_rank, device)


def _quieten() -> None:
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")


def deepspeed_settings(
    file_settings: dict[str, Any], *, micro_batch: int, precision: str, grad_clip: float
) -> dict[str, Any]:
    """DeepSpeed's whole configuration: the file's ZeRO settings and the run's own."""
    return {
        **file_settings,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": 1,
        # Each backward reduces at once into the rank's own slice and `step` ends the batch: any
        # number of micro-batches and loss chunks, and never a full copy of the gradients.
        "managed_gradient_accumulation": False,
        "gradient_clipping": grad_clip,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": precision == "bf16"},
    }


def start_engine(
    model: nn.Module, optimizer: torch.optim.Optimizer, settings: dict[str, Any]
) -> Any:
    """A DeepSpeed engine around `model` and `optimizer`."""
    import deepspeed

    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=settings, dist_init_required=False
    )
    return engine


def backward(engine: Any, loss: torch.Tensor) -> None:
    """Add `loss`'s gradients to those of this step; any number of times before `engine.step()`."""
    engine.backward(loss, scale_wrt_gas=False)
    # DeepSpeed counts micro-batches where `engine.forward` begins. Losses that come in chunks do
    # not pass through it, and without this each backward would overwrite the one before.
    engine.optimizer.clear_backward_seen_flag()


def stop() -> None:
    """Leave the other ranks cleanly."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """`values` summed over the ranks, in place; int64 wraps modulo 2**64."""
    dist.all_reduce(values, op=dist.ReduceOp.SUM)
    return values


def same_everywhere(value: object) -> Any:
    """Rank 0's `value`, on every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def all_agree(ok: bool) -> bool:
    """Whether `ok` holds on every rank."""
    flag = torch.tensor([0 if ok else 1], dtype=torch.int64)
    if torch.cuda.is_available():
        flag = flag.cuda()
    return int(sum_over_ranks(flag)) == 0


def barrier() -> None:
    """Wait for every rank."""
    dist.barrier()

"""Whether collectives between the nodes work, how fast they are, and whether clocks agree."""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from pipeline.distributed import World

FIRST_SECONDS = 60.0  # in which the first all-reduce must end
_SMALL_ROUNDS, _LARGE_ROUNDS, _CLOCK_ROUNDS = 5, 2, 3
_LARGE_BYTES = {"cpu": 4 << 20, "cuda": 64 << 20}


@dataclass(frozen=True)
class Links:
    """What the ranks measured together; the same on all.

    Attributes:
        latency_seconds: of an all-reduce of one number, the median.
        large_bytes, large_seconds: of a large all-reduce, the fastest.
        clock_offsets: seconds by which each rank's clock is ahead of rank 0's.
    """

    latency_seconds: float
    large_bytes: int
    large_seconds: float
    clock_offsets: tuple[float, ...]

    @property
    def clock_spread(self) -> float:
        """Seconds between the clocks that are furthest apart, the measurement's error included."""
        return max(self.clock_offsets) - min(self.clock_offsets)

    def record(self) -> dict[str, Any]:
        """For preflight.json."""
        return {
            "all_reduce": {
                "latency_seconds": round(self.latency_seconds, 6),
                "bytes": self.large_bytes,
                "bytes_per_second": round(self.large_bytes / self.large_seconds),
            },
            "clock_spread_seconds": round(self.clock_spread, 3),
        }

    def __str__(self) -> str:
        rate = self.large_bytes / self.large_seconds
        return (
            f"all-reduce {1e3 * self.latency_seconds:.2f} ms, {self.large_bytes >> 20} MiB at "
            f"{rate / 1e9:.2f} GB/s; clocks within {self.clock_spread:.3f} s"
        )


def measure(world: World, limit_seconds: float = FIRST_SECONDS) -> Links:
    """Time all-reduces and compare clocks; a collective.

    Raises RuntimeError, torch's own, where the first all-reduce does not end in `limit_seconds`.
    """
    number = torch.zeros(1, device=world.device)
    first = dist.all_reduce(number, async_op=True)
    assert first is not None
    first.wait(timedelta(seconds=limit_seconds))
    small = sorted(_timed(number) for _ in range(_SMALL_ROUNDS))[_SMALL_ROUNDS // 2]
    large = torch.zeros(_LARGE_BYTES[world.device.type] // 4, device=world.device)
    best = min(_timed(large) for _ in range(_LARGE_ROUNDS))
    # Each rank's own times: the slowest rank's count.
    slowest = torch.tensor([small, best], dtype=torch.float64, device=world.device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    latency, seconds = slowest.tolist()
    return Links(latency, large.numel() * 4, seconds, _clock_offsets(world))


def _timed(values: torch.Tensor) -> float:
    _settle(values)
    started = time.perf_counter()
    dist.all_reduce(values)
    _settle(values)
    return time.perf_counter() - started


def _settle(values: torch.Tensor) -> None:
    if values.is_cuda:
        torch.cuda.synchronize(values.device)


def _clock_offsets(world: World) -> tuple[float, ...]:
    """All ranks read their clocks as they leave a collective together, several times."""
    rounds = []
    for _ in range(_CLOCK_ROUNDS):
        _timed(torch.zeros(1, device=world.device))
        mine = torch.tensor([time.time()], dtype=torch.float64, device=world.device)
        told = [torch.zeros_like(mine) for _ in range(world.size)]
        dist.all_gather(told, mine)
        rounds.append([float(value - told[0]) for value in told])
    # A rank that was held up as it left looks ahead by as much: the smallest counts.
    return tuple(min(offsets, key=abs) for offsets in zip(*rounds, strict=True))

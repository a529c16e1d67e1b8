"""Which ds_config, micro-batch and checkpointing: the quickest prediction that fits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from pipeline.deepspeed_file import run_problems
from tools.planning.cluster import Cluster
from tools.planning.memory import Moment, peak
from tools.planning.request import Request
from tools.planning.speed import Speed, speed
from tools.planning.states import states

# Of ds_configs/, in the order in which they are tried: less communication first.
GPU_FILES = ("zero1", "zero2", "zero3", "zero3_offload")
CPU_FILES = ("cpu",)


@dataclass(frozen=True)
class Choice:
    """One way to run, and what is predicted of it."""

    file: str
    request: Request
    peak: Moment
    needs: int
    """Bytes of a device's memory, runtime and allocator included."""
    speed: Speed


@dataclass(frozen=True)
class Freedom:
    """What may be chosen; one value where the user has chosen.

    Attributes:
        files: name and settings of DeepSpeed files.
        micro_batch: the user's, or None for every divisor of a rank's share.
        checkpointing: whether blocks are computed again.
    """

    files: tuple[tuple[str, dict[str, Any]], ...]
    micro_batch: int | None
    checkpointing: tuple[bool, ...]


def choices(request: Request, cluster: Cluster, freedom: Freedom, share: int) -> Iterator[Choice]:
    """Of each file, with and without checkpointing, the largest micro-batch that fits; `share` is
    a rank's part of the global batch."""
    sizes = [n for n in range(share, 0, -1) if share % n == 0]
    if freedom.micro_batch is not None:
        sizes = [freedom.micro_batch]
    for file, settings in freedom.files:
        if any(run_problems(settings, precision=request.precision)):
            continue
        for again in freedom.checkpointing:
            base = replace(
                request,
                zero=settings["zero_optimization"],
                ranks=cluster.devices,
                model=replace(request.model, activation_checkpointing=again),
            )
            found = _largest(base, cluster, sizes, share, file)
            if found is not None:
                yield found


def _largest(
    base: Request, cluster: Cluster, sizes: list[int], share: int, file: str
) -> Choice | None:
    """With the largest of `sizes`, given from large to small, that fits; by halves, because less
    never takes more."""
    low, high, found = 0, len(sizes) - 1, None
    while low <= high:
        middle = (low + high) // 2
        request = replace(
            base, micro_batch=sizes[middle], backward_calls=max(1, share // sizes[middle])
        )
        fullest = peak(request)
        needs = cluster.needs(fullest.total)
        if cluster.holds(needs, sum(states(request).host.values())):
            found = Choice(file, request, fullest, needs, speed(request, cluster))
            high = middle - 1
        else:
            low = middle + 1
    return found


def best(request: Request, cluster: Cluster, freedom: Freedom, share: int) -> Choice | None:
    """The quickest by the middle of its range; None where nothing fits."""
    found = list(choices(request, cluster, freedom, share))
    return min(found, key=lambda c: c.speed.step.low + c.speed.step.high, default=None)


def closest(request: Request, cluster: Cluster, freedom: Freedom) -> Choice:
    """Of what does not fit a device, what needs the least: one sequence at a time, or as the user
    said. Where all fit devices and none its host, any of those."""
    found = []
    for file, settings in freedom.files:
        for again in freedom.checkpointing:
            tried = replace(
                request,
                zero=settings["zero_optimization"],
                ranks=cluster.devices,
                micro_batch=freedom.micro_batch or 1,
                model=replace(request.model, activation_checkpointing=again),
            )
            fullest = peak(tried)
            needs = cluster.needs(fullest.total)
            found.append(Choice(file, tried, fullest, needs, speed(tried, cluster)))
    beyond = [choice for choice in found if choice.needs > cluster.device.memory]
    return min(beyond or found, key=lambda choice: choice.needs)


def smallest(
    request: Request, cluster: Cluster, freedom: Freedom, most: int = 1 << 16
) -> tuple[Cluster, Choice] | None:
    """The fewest devices of the same kind that can hold the run one sequence at a time; None where
    none of at most `most` can."""
    sizes = [n for n in (1, 2, 4) if n < cluster.per_node]
    nodes = 1
    while nodes * cluster.per_node <= most:
        sizes.append(nodes * cluster.per_node)
        nodes *= 2
    below = 0
    for devices in sizes:
        found = _fits(request, cluster.of(devices), freedom)
        if found is None:
            below = devices
            continue
        # Between two powers of two nodes a smaller number may do.
        step = cluster.per_node
        low, high = below // step + 1, devices // step
        while low < high:
            middle = (low + high) // 2
            tried = _fits(request, cluster.of(middle * step), freedom)
            if tried is None:
                low = middle + 1
            else:
                high, found, devices = middle, tried, middle * step
        return cluster.of(devices), found
    return None


def _fits(request: Request, cluster: Cluster, freedom: Freedom) -> Choice | None:
    one = replace(freedom, micro_batch=freedom.micro_batch or 1)
    return best(request, cluster, one, one.micro_batch or 1)

"""Which ds_config, micro-batches and checkpointing: the quickest prediction that fits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from pipeline.deepspeed_file import run_problems
from tools.planning.cluster import Cluster
from tools.planning.memory import Moment, evaluation_moments, fullest, host, step_moments
from tools.planning.request import Request
from tools.planning.speed import Speed, speed

# Of ds_configs/, in the order in which they are tried: less communication first.
GPU_FILES = ("zero1", "zero2", "zero3", "zero3_offload")
CPU_FILES = ("cpu",)


@dataclass(frozen=True)
class Choice:
    """One way to run, and what is predicted of it."""

    file: str
    request: Request
    eval_micro_batch: int
    """As a run is told; a rank may have fewer sequences to score."""
    step: Moment
    """The fullest of a training step."""
    evaluation: Moment
    """The fullest of an evaluation."""
    needs: int
    """Bytes of a device's memory, runtime and allocator included."""
    speed: Speed

    @property
    def peak(self) -> Moment:
        """The fullest of all."""
        return fullest((self.step, self.evaluation))


@dataclass(frozen=True)
class Freedom:
    """What may be chosen; one value where the user has chosen.

    Attributes:
        files: name and settings of DeepSpeed files.
        global_batch: sequences of a step, over all devices: a launch's devices divide it.
        micro_batch: the user's, or None for every divisor of a rank's share.
        checkpointing: whether blocks are computed again.
        eval_micro_batches: held-out sequences that a rank may hold at once, from many to few.
        eval_sequences: held-out sequences of an evaluation, over all devices.
    """

    files: tuple[tuple[str, dict[str, Any]], ...]
    global_batch: int
    micro_batch: int | None
    checkpointing: tuple[bool, ...]
    eval_micro_batches: tuple[int, ...]
    eval_sequences: int

    def device_counts(self) -> list[int]:
        """Numbers of devices that a launch accepts, from few to many."""
        unit = self.global_batch // (self.micro_batch or 1)
        return [n for n in range(1, unit + 1) if unit % n == 0]

    def micro_batches(self, devices: int) -> list[int]:
        """Sizes that a rank's share can be cut into, from large to small."""
        if self.micro_batch is not None:
            return [self.micro_batch]
        share = self.global_batch // devices
        return [n for n in range(share, 0, -1) if share % n == 0]

    def ways(self, request: Request) -> Iterator[tuple[str, list[Request]]]:
        """`request` by each file that can run it, with and without checkpointing."""
        for file, settings in self.files:
            if any(run_problems(settings, precision=request.precision)):
                continue
            zero = settings["zero_optimization"]
            models = [
                replace(request.model, activation_checkpointing=x) for x in self.checkpointing
            ]
            yield file, [replace(request, zero=zero, model=model) for model in models]

    def cut(self, request: Request, micro_batch: int) -> Request:
        """`request` with its step cut into micro-batches of a size."""
        share = self.global_batch // request.ranks
        return replace(request, micro_batch=micro_batch, backward_calls=share // micro_batch)

    def scoring(self, request: Request, size: int) -> Request:
        """`request` with evaluations of so many sequences at once, or all that a rank has."""
        share = -(-self.eval_sequences // request.ranks)
        return replace(request, evaluated=min(size, share))


def choices(request: Request, cluster: Cluster, freedom: Freedom) -> Iterator[Choice]:
    """Of each file, with and without checkpointing, the largest micro-batches that fit."""
    for file, bases in freedom.ways(replace(request, ranks=cluster.devices)):
        # What an evaluation holds, and a host, depends on the file alone.
        if not cluster.holds_on_host(sum(host(bases[0]).values())):
            continue
        size = _largest_evaluation(bases[0], cluster, freedom)
        for base in bases if size else ():
            micro_batch = _largest(base, cluster, freedom)
            if size and micro_batch:
                scored = freedom.scoring(freedom.cut(base, micro_batch), size)
                yield _described(file, scored, size, cluster)


def _largest_evaluation(base: Request, cluster: Cluster, freedom: Freedom) -> int | None:
    for size in freedom.eval_micro_batches:
        if cluster.fits(fullest(evaluation_moments(freedom.scoring(base, size))).total):
            return size
    return None


def _largest(base: Request, cluster: Cluster, freedom: Freedom) -> int | None:
    """The largest micro-batch whose step fits, by halves, because less never takes more: but a
    share in one piece, whose gradients need not wait for others, may take less than one in two."""

    def fits(micro_batch: int) -> bool:
        moments = step_moments(freedom.cut(base, micro_batch))
        return cluster.fits(fullest(moments).total)

    whole, *sizes = freedom.micro_batches(base.ranks)
    if fits(whole):
        return whole
    low, high, found = 0, len(sizes) - 1, None
    while low <= high:
        middle = (low + high) // 2
        if fits(sizes[middle]):
            found, high = sizes[middle], middle - 1
        else:
            low = middle + 1
    return found


def _described(file: str, request: Request, size: int, cluster: Cluster) -> Choice:
    step, scoring = fullest(step_moments(request)), fullest(evaluation_moments(request))
    needs = cluster.needs(fullest((step, scoring)).total)
    return Choice(file, request, size, step, scoring, needs, speed(request, cluster))


def best(request: Request, cluster: Cluster, freedom: Freedom) -> Choice | None:
    """The quickest by the middle of its range; None where nothing fits."""
    found = list(choices(request, cluster, freedom))
    return min(found, key=lambda c: c.speed.step.low + c.speed.step.high, default=None)


def closest(
    request: Request, cluster: Cluster, freedom: Freedom
) -> tuple[Choice | None, Choice | None]:
    """Where nothing fits: of what does not fit a device what needs the least, and of what does, but
    not its host, what needs the least there."""
    beyond, inside = [], []
    for file, bases in freedom.ways(replace(request, ranks=cluster.devices)):
        sizes, size = freedom.micro_batches(cluster.devices), freedom.eval_micro_batches[-1]
        for base in bases:
            for micro_batch in sorted({sizes[0], sizes[-1]}):
                scored = freedom.scoring(freedom.cut(base, micro_batch), size)
                choice = _described(file, scored, size, cluster)
                (inside if choice.needs <= cluster.device.memory else beyond).append(choice)
    return (
        min(beyond, key=lambda choice: choice.needs, default=None),
        min(inside, key=lambda choice: sum(host(choice.request).values()), default=None),
    )


def smallest(request: Request, cluster: Cluster, freedom: Freedom) -> tuple[Cluster, Choice] | None:
    """The fewest devices of the same kind that a launch accepts and that hold the run; None where
    no number of them does."""
    for devices in freedom.device_counts():
        found = best(request, cluster.of(devices), freedom)
        if found is not None:
            return cluster.of(devices), found
    return None

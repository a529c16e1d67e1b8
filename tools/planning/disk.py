"""What a run needs on disk: its shards, and the checkpoints that stay."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.checkpointing.retention import Retention
from pipeline.optim.recipe import factored_dims
from tools.planning.request import Request

# A checksum for each 4 KiB of tokens, and about a GiB a shard.
CHECKSUM, SHARD_BYTES = 8 / 4096, 1 << 30


@dataclass(frozen=True)
class Disk:
    """Bytes, and how many things hold them."""

    data: int
    shards: int
    shards_per_rank: float
    checkpoint: int
    checkpoints: int
    """Kept at the end, the one with the lowest loss and one being written included."""

    @property
    def total(self) -> int:
        """Of shards and checkpoints."""
        return self.data + self.checkpoint * self.checkpoints


def disk(request: Request, tokens: int, steps: int, retention: Retention) -> Disk:
    """For a run that goes once through `tokens`."""
    width = 2 if request.model.vocab_size <= 1 << 16 else 4
    data = int(tokens * width * (1 + CHECKSUM))
    shards = max(1, -(-data // SHARD_BYTES))
    return Disk(
        data=data,
        shards=shards,
        shards_per_rank=shards / request.ranks,
        checkpoint=checkpoint_bytes(request),
        checkpoints=kept(steps, retention),
    )


def checkpoint_bytes(request: Request) -> int:
    """fp32 masters and optimizer states, each element once."""
    total = 0
    for parameter in request.parameters:
        total += 4 * parameter.numel
        dims = factored_dims(parameter.shape, 128) if request.factored else None
        if request.optimizer == "adamw":
            total += 8 * parameter.numel
        elif request.optimizer == "muon":
            hidden = len(parameter.shape) > 1 and "embedding." not in parameter.name
            total += (4 if hidden else 8) * parameter.numel
        else:
            if dims is None:
                total += 4 * parameter.numel
            else:
                total += 4 * sum(parameter.numel // parameter.shape[dim] for dim in dims)
            total += 4 * parameter.numel * request.momentum
    return total


def kept(steps: int, retention: Retention) -> int:
    """Checkpoints on disk at the fullest moment of a run of `steps`."""
    every = retention.save_every
    newest = [steps]
    if every:
        last = (steps - 1) // every * every
        newest += range(last, 0, -every)[: max(1, retention.keep_last) - 1]
    stay = set(newest)
    if retention.keep_every:
        stay |= set(range(retention.keep_every, steps + 1, retention.keep_every))
    if retention.log_spaced:
        decades = range(retention.log_spaced * len(str(steps)) + 1)
        spaced = (round(10 ** (i / retention.log_spaced)) for i in decades)
        stay |= {step for step in spaced if step <= steps}
    # The best one, and the one that is written before an old one goes.
    return len(stay) + 2

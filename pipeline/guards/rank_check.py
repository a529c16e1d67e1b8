"""Whether all ranks hold the same values where they should: by hash, one parameter at a time.

What is compared is what a rank computes with: at stages 0 to 2 its whole working parameters, at
stage 3 each parameter as it is gathered (those that stay gathered included), and what an optimizer
keeps whole on every rank. A rank whose memory or network lies would otherwise train another model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from pipeline import zero_layout
from pipeline.callbacks.base import Callback, StepRecord
from pipeline.checkpointing.retention import Retention
from pipeline.distributed import sum_over_ranks
from pipeline.options import Fault

if TYPE_CHECKING:
    from pipeline.trainer import Trainer

_CHUNK = 1 << 20  # elements that are widened to int64 at a time
_MIX = -7046029254386353131  # 2**64 over the golden ratio, odd, as int64
_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def tensor_hash(tensor: torch.Tensor, first: int = 0) -> int:
    """64 bits of a tensor's bytes, by sums modulo 2**64 on its own device.

    Each word is multiplied by an odd number of its own place: one changed word always changes it.
    The hashes of a tensor's parts, whose places begin at `first`, sum up to that of the whole.
    """
    words = tensor.detach().reshape(-1).contiguous()
    words = words.view(_WORDS[words.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, words.numel(), _CHUNK):
        part = words[start : start + _CHUNK].long()
        places = torch.arange(start, start + part.numel(), device=tensor.device) + first
        total += (part * (places * _MIX * 2 + 1)).sum()
    return int(total)


def minority(hashes: Sequence[int]) -> list[int]:
    """The ranks whose hash is not the one that most have; all where none is held by more."""
    if len(set(hashes)) == 1:
        return []
    (most, votes), *others = Counter(hashes).most_common()
    if others[0][1] == votes:
        return list(range(len(hashes)))
    return [rank for rank, each in enumerate(hashes) if each != most]


def local_hashes(engine: Any) -> dict[str, int]:
    """Name to hash of everything that should be the same on all ranks; a collective."""
    wholes = zero_layout.whole_parameters(engine.module, engine.zero_optimization_stage())
    hashes = {name: tensor_hash(whole) for name, whole in wholes}
    for key, value in zero_layout.replicated_state(engine).items():
        hashes[f"optimizer state {key}"] = tensor_hash(value)
    return hashes


def disagreements(
    hashes: dict[str, int], world_size: int, device: torch.device
) -> dict[str, list[int]]:
    """Name to every rank's hash, of what is not the same on all; a collective."""
    mine = torch.tensor(list(hashes.values()), dtype=torch.int64, device=device)
    everyones = [torch.empty_like(mine) for _ in range(world_size)]
    dist.all_gather(everyones, mine)
    columns = torch.stack(everyones).T.tolist()
    found = zip(hashes, columns, strict=True)
    return {name: column for name, column in found if len(set(column)) > 1}


def owned_hash(engine: Any, name: str) -> int | None:
    """A parameter's hash by what the owners of its parts hold, each its fp32 masters; a collective.

    None at stage 0, where no part is one rank's, and of what is no parameter.
    """
    fragment = next((each for each in zero_layout.fragments(engine) if each.name == name), None)
    if fragment is None or fragment.replicated:
        return None
    working = next(engine.module.parameters())
    part = fragment.of(fragment.flat.detach()).to(working.dtype)
    hashed = torch.tensor(tensor_hash(part, fragment.start), device=working.device)
    return int(sum_over_ranks(hashed))


def outvoted(engine: Any, name: str, hashes: Sequence[int]) -> str:
    """Who holds other values of `name`, in words: without a majority the owners say. A collective.

    hashes: every rank's.
    """
    wrong, rest = minority(hashes), "the rest"
    if len(wrong) == len(hashes):
        owned, rest = owned_hash(engine, name), "those that own the parts"
        wrong = [rank for rank, each in enumerate(hashes) if each != owned]
    if len(wrong) == len(hashes):
        return f"ranks 0 to {len(hashes) - 1} hold different values, and no majority the same,"
    return f"rank(s) {', '.join(map(str, wrong))} hold other values than {rest}"


class RankCheck(Callback):
    """Ends the run where ranks hold different values, before they are saved."""

    phase = "check"

    def __init__(self) -> None:
        self._compared = 0  # the last step after which it was done

    def on_step(self, trainer: Trainer, record: StepRecord) -> None:
        """Compare at every `check_ranks_every`-th step, and before a checkpoint.

        Raises Fault on every rank.
        """
        every = trainer.config.check_ranks_every
        if every and trainer.step % every == 0:
            self._compare(trainer)
        elif Retention.of(trainer.config).falls_due(record):
            self._before_saving(trainer)

    def on_rolled_back(self, trainer: Trainer) -> None:
        """Steps that are made again hold other values."""
        self._compared = 0

    def on_end(self, trainer: Trainer) -> None:
        """Compare what is saved last. Raises Fault on every rank."""
        self._before_saving(trainer)

    on_stop = on_end

    def _before_saving(self, trainer: Trainer) -> None:
        """Else the next start would read one rank's values into all of them.

        At stage 3 each part of a parameter is one rank's alone: a checkpoint mixes none.
        """
        if trainer.engine.zero_optimization_stage() < 3 and trainer.step != self._compared:
            self._compare(trainer)

    def _compare(self, trainer: Trainer) -> None:
        every, size = trainer.config.check_ranks_every, trainer.world.size
        self._compared = trainer.step
        if not every or size == 1:
            return
        found = disagreements(local_hashes(trainer.engine), size, trainer.world.device)
        if not found:
            return
        name, hashes = next(iter(found.items()))
        who = outvoted(trainer.engine, name, hashes)
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        raise Fault(
            f"check_ranks_every={every}: after step {trainer.step} {who} of {name}{more}; see to "
            "that rank's memory and network; the same command goes on from the last checkpoint"
        )

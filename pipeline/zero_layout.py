"""Where ZeRO-3 keeps each parameter: the map from names to places in this rank's flat tensors.

DeepSpeed 0.19.8 cuts every parameter separately: of a parameter with n elements on R ranks, rank r
owns the flattened elements [r·ceil(n/R), (r+1)·ceil(n/R)), clipped to n, and the slices of one
sub-group are laid end to end in one flat fp32 tensor (padding at the tail of the last owners). That
is what torch calls `Shard(0)` of the flattened parameter. The attributes read here are not public
API, so they are checked against each other before use.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Fragment:
    """This rank's slice of one parameter, inside the flat tensor of its sub-group."""

    name: str
    flat: torch.Tensor
    offset: int
    length: int
    numel: int

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The slice of `tensor`, which is laid out as `flat` is; a view, [length]."""
        return tensor.narrow(0, self.offset, self.length)


def fragments(engine: Any) -> list[Fragment]:
    """This rank's fragments of every trainable parameter, in a fixed order."""
    optimizer = engine.optimizer
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    rank = torch.distributed.get_rank()
    found = []
    for group, flat in zip(
        optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True
    ):
        offset = 0
        for parameter in group:
            slot = parameter.partition_numel()
            start = min(rank * slot, parameter.ds_numel)
            end = min((rank + 1) * slot, parameter.ds_numel)
            found.append(
                Fragment(names[id(parameter)], flat, offset, end - start, parameter.ds_numel)
            )
            offset += slot
        if offset != flat.numel():
            raise RuntimeError(
                f"DeepSpeed's flat tensor holds {flat.numel()} elements where its parameters take "
                f"{offset}: this version lays them out differently; use the pinned one"
            )
    return found


def optimizer_state(engine: Any, flat: torch.Tensor) -> dict[str, Any]:
    """The client optimizer's state of one flat tensor (empty before its first step)."""
    return dict(engine.optimizer.optimizer.state.get(flat, {}))


def flat_tensors(engine: Any) -> Iterator[torch.Tensor]:
    """The flat fp32 tensors of this rank's sub-groups."""
    yield from engine.optimizer.fp32_partitioned_groups_flat


def publish_masters(engine: Any) -> None:
    """Bring the working parameters up to date after the fp32 masters were written."""
    optimizer = engine.optimizer
    for index in range(len(optimizer.fp32_partitioned_groups_flat)):
        optimizer._reassign_or_swap_out_partitioned_parameters(index)
    if optimizer.persistent_parameters:
        optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)

"""Where ZeRO keeps each parameter: the map from names to places in this rank's flat tensors.

DeepSpeed 0.19.8 hands its optimizer flat fp32 tensors, and each stage cuts them in its own way:

* Stage 0 cuts nothing: every rank holds every parameter whole (in bf16, an fp32 copy of it).
* Stages 1 and 2 lay the parameters of one group end to end, pad the end to a multiple of twice the
  number of ranks and cut it into equal pieces: a piece may begin and end inside a matrix, and hold
  nothing of most parameters.
* Stage 3 cuts every parameter separately: of n elements on R ranks, rank r owns the flattened
  elements [r·ceil(n/R), (r+1)·ceil(n/R)), clipped to n. The slices of one sub-group lie end to end
  in one flat tensor, with padding at the tail of the last owners.

In each case a rank holds at most one contiguous slice of a flattened parameter. Optimizer states
are laid out as the flat tensor is, but for Muon's momentum at stages 1 and 2 without offload: of
that a rank keeps whole every matrix that it has a slice of, one after the other.

The attributes read here are not public API: they are checked against each other, and over all
ranks, before use.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from pipeline.distributed import sum_over_ranks

# The version whose private attributes these are.
DEEPSPEED = "0.19.8"
# Keys of optimizer state that `replicated_state` gives: Adafactor's row and column statistics.
REPLICATED = frozenset({"row", "column"})
# The key of the state that is kept whole by every rank with a slice: see `Fragment.whole_at`.
WHOLE = "momentum_buffer"


@dataclass(frozen=True)
class Fragment:
    """This rank's slice of one parameter, inside the flat tensor that the optimizer is given.

    Attributes:
        name: the parameter's, in the model.
        shape: the whole parameter's.
        flat: the optimizer's tensor that holds the slice. At stage 0 the whole parameter.
        offset: where the slice begins in `flat`.
        start: where the slice begins in the flattened parameter.
        length: elements of the slice; 0 where this rank holds nothing of the parameter.
        replicated: every rank holds the same slice, which is the whole parameter (stage 0).
        whole_at: where the whole parameter begins in the optimizer's state WHOLE; None where that
            is laid out as `flat` is.
    """

    name: str
    shape: torch.Size
    flat: torch.Tensor
    offset: int
    start: int
    length: int
    replicated: bool = False
    whole_at: int | None = None

    @property
    def numel(self) -> int:
        """Elements of the whole parameter."""
        return self.shape.numel()

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The slice of `tensor`, which is laid out as `flat` is; a view, [length]."""
        return tensor.view(-1).narrow(0, self.offset, self.length)

    def kept(self, key: str, state: torch.Tensor) -> tuple[int, torch.Tensor]:
        """What the rank keeps of the parameter in the optimizer's state `key`, and from where.

        A view of at least the slice, and where it begins in the flattened parameter.
        """
        if key != WHOLE or self.whole_at is None:
            return self.start, self.of(state)
        return 0, state.narrow(0, self.whole_at, self.numel)

    def owned(self, key: str, state: torch.Tensor) -> torch.Tensor:
        """The slice of the optimizer's state `key`; a view, [length]."""
        start, kept = self.kept(key, state)
        return kept.narrow(0, self.start - start, self.length)


def fragments(engine: Any) -> list[Fragment]:
    """This rank's fragments of every trainable parameter, in an order equal on all ranks.

    Those of one flat tensor follow each other in the order in which they lie there.

    Raises:
        RuntimeError: this version of DeepSpeed lays its tensors out differently.
    """
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    stage = engine.zero_optimization_stage()
    try:
        if stage == 3:
            found = list(_stage_3(engine.optimizer, names))
        elif stage in (1, 2):
            found = list(_stages_1_and_2(engine.optimizer, names))
        else:
            found = list(_stage_0(engine.optimizer, names))
    except (AttributeError, KeyError, ValueError) as error:
        raise _other_layout(f"ZeRO-{stage}: {error}") from error
    return found


def check_cover(found: list[Fragment]) -> None:
    """Prove that the ranks together hold every element of every parameter once. A collective.

    Raises:
        RuntimeError: they do not, so this version of DeepSpeed cuts differently.
    """
    # The number of elements held, and the sum of their places: equal to those of the whole.
    held = [[f.length, _sum_of_range(f.start, f.length)] for f in found]
    whole = [[f.numel, _sum_of_range(0, f.numel)] for f in found]
    summed = torch.tensor(held, dtype=torch.int64)
    if found and not found[0].replicated:
        sum_over_ranks(summed)
    for fragment, got, expected in zip(found, summed.tolist(), whole, strict=True):
        if got != expected:
            raise _other_layout(f"the ranks hold {got[0]} of {fragment.numel} of {fragment.name}")


def client_optimizer(engine: Any) -> torch.optim.Optimizer:
    """The optimizer that DeepSpeed was given, out of its wrapper."""
    optimizer: torch.optim.Optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    return optimizer


def optimizer_state(engine: Any, flat: torch.Tensor) -> dict[str, Any]:
    """The client optimizer's state of one flat tensor (empty before its first step).

    Tensors of more than one element are laid out as the flat one is; what an optimizer keeps whole
    on every rank is in `replicated_state` instead.
    """
    state = client_optimizer(engine).state.get(flat, {})
    return {key: value for key, value in state.items() if key not in REPLICATED}


def replicated_state(engine: Any) -> dict[str, torch.Tensor]:
    """What the optimizer keeps whole and equal on every rank, by KEY/PARAMETER; views to fill."""
    named = getattr(client_optimizer(engine), "replicated_state", None)
    return {} if named is None else dict(named())


def empty_state(key: str, of_flat: Sequence[Fragment], dtype: torch.dtype) -> torch.Tensor:
    """Zeros for the optimizer's state `key` of one flat tensor, whose fragments are `of_flat`."""
    flat = of_flat[0].flat.detach()
    whole = [fragment.numel for fragment in of_flat if fragment.whole_at is not None]
    if key == WHOLE and whole:
        return flat.new_zeros(sum(whole), dtype=dtype)
    return torch.zeros_like(flat, dtype=dtype)


def reset_optimizer(engine: Any) -> None:
    """Bring the optimizer's states to what they are before its first step.

    In all our optimizers that is nothing, or zeros and a count of 0. They stay where they are:
    DeepSpeed keeps views of them.
    """
    for state in client_optimizer(engine).state.values():
        for key, value in state.items():
            if torch.is_tensor(value):
                value.zero_()
            else:
                state[key] = type(value)(0)


def whole_parameters(model: nn.Module, stage: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Each parameter of a model by name, whole on every rank while it is the turn's; a collective.

    `stage` is the model's of ZeRO: at 3 each is gathered.
    """
    import deepspeed

    for name, parameter in model.named_parameters():
        gather = deepspeed.zero.GatheredParameters([parameter]) if stage == 3 else nullcontext()
        with gather:
            yield name, parameter.data


def flat_tensors(engine: Any) -> Iterator[torch.Tensor]:
    """The fp32 tensors that this rank's optimizer updates, each once."""
    yield from {id(fragment.flat): fragment.flat for fragment in fragments(engine)}.values()


def publish_masters(engine: Any) -> None:
    """Bring the working parameters up to date after the fp32 masters were written. A collective."""
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 3:
        for index in range(len(optimizer.fp32_partitioned_groups_flat)):
            optimizer._reassign_or_swap_out_partitioned_parameters(index)
        # Those that stay gathered between steps would keep what they were gathered from before.
        optimizer._partition_all_parameters()
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
    elif stage in (1, 2):
        optimizer.update_lp_params()
    elif hasattr(optimizer, "fp32_groups"):
        for masters, working in zip(optimizer.fp32_groups, optimizer.fp16_groups, strict=True):
            torch._foreach_copy_([p.data for p in working], [p.data for p in masters])


def _stage_3(optimizer: Any, names: dict[int, str]) -> Iterator[Fragment]:
    rank = dist.get_rank(optimizer.dp_process_group)
    flats = optimizer.fp32_partitioned_groups_flat
    for group, flat in zip(optimizer.fp16_groups, flats, strict=True):
        offset = 0
        for parameter in group:
            slot = parameter.partition_numel()
            start = min(rank * slot, parameter.ds_numel)
            end = min((rank + 1) * slot, parameter.ds_numel)
            name, shape = names[id(parameter)], torch.Size(parameter.ds_shape)
            yield Fragment(name, shape, flat, offset, start, end - start)
            offset += slot
        if offset != flat.numel():
            raise ValueError(f"a flat tensor has {flat.numel()} elements for {offset}")


def _stages_1_and_2(optimizer: Any, names: dict[int, str]) -> Iterator[Fragment]:
    # bf16 at stage 1 with gradients accumulated in fp32 has a wrapper class of its own.
    if hasattr(optimizer, "bf16_groups"):
        groups, flats = optimizer.bf16_groups, optimizer.fp32_groups_flat_partition
    else:
        groups, flats = optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups
    for index, (group, flat) in enumerate(zip(groups, flats, strict=True)):
        whole = _kept_whole(optimizer, index)
        for parameter in group:
            name, place = names[id(parameter)], parameter._hp_mapping
            shape, whole_at = parameter.shape, whole.get(id(parameter))
            if place is None:
                yield Fragment(name, shape, flat, 0, 0, 0, whole_at=whole_at)
                continue
            held, of_whole = place.hp_fragment_address, place.lp_fragment_address
            if held.numel != of_whole.numel or held.start + held.numel > flat.numel():
                raise ValueError(f"{name} lies outside its flat tensor")
            offset, start = held.start, of_whole.start
            yield Fragment(name, shape, flat, offset, start, held.numel, whole_at=whole_at)


def _kept_whole(optimizer: Any, group: int) -> dict[int, int]:
    """Where each parameter of a group begins in the state that is kept whole; none, mostly."""
    found: dict[int, int] = {}
    if not hasattr(optimizer, "bf16_groups") and not optimizer.cpu_offload:
        offset = 0
        for parameter in optimizer.params_in_partition[group]:
            if getattr(parameter, "use_muon", False):
                found[id(parameter)] = offset
                offset += parameter.numel()
    return found


def _stage_0(optimizer: Any, names: dict[int, str]) -> Iterator[Fragment]:
    if hasattr(optimizer, "fp32_groups"):  # bf16: masters beside the working parameters
        working, masters = optimizer.fp16_groups, optimizer.fp32_groups
    else:
        working = masters = [group["params"] for group in optimizer.param_groups]
    for group, flats in zip(working, masters, strict=True):
        for parameter, flat in zip(group, flats, strict=True):
            if parameter.requires_grad:
                shape = parameter.shape
                name = names[id(parameter)]
                yield Fragment(name, shape, flat, 0, 0, shape.numel(), replicated=True)


def _sum_of_range(start: int, length: int) -> int:
    return length * start + length * (length - 1) // 2


def _other_layout(what: str) -> RuntimeError:
    import deepspeed

    return RuntimeError(
        f"deepspeed {deepspeed.__version__} lays parameters out differently from {DEEPSPEED} "
        f"({what}); install deepspeed=={DEEPSPEED}"
    )

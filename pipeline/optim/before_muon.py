"""The whole gradient's norm, and its clipping, before Muon makes its updates of it.

DeepSpeed 0.19.8 writes Muon's orthogonalised updates where the gradients were, and then takes the
norm that it logs and clips by: that of the updates, whose size says nothing of the gradients'. Its
optimizer of bf16 at stage 1 without offload alone clips first.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch


class _Clip:
    """What this step's gradients are multiplied by, and what their norm was."""

    def __init__(self, largest: float) -> None:
        self._largest = largest  # 0: none
        self.norm = math.inf

    def factor(self, norms: list[torch.Tensor]) -> float:
        """By the norms of the groups; nan where one is not finite, which no step should survive."""
        from deepspeed.runtime.utils import combine_grad_norm_groups

        self.norm = float(combine_grad_norm_groups(norms))
        if not math.isfinite(self.norm):
            return math.nan
        return min(1.0, self._largest / (self.norm + 1e-6)) if self._largest else 1.0


def look_before_muon(engine: Any, grad_clip: float) -> None:
    """Have the engine of a Muon run at ZeRO 1 to 3 clip and log its gradients, not Muon's updates.

    A step whose gradients are not finite is skipped before Muon's momentum takes it in.
    """
    zero = engine.optimizer
    if hasattr(zero, "bf16_groups"):
        return
    zero.clip_grad = 0.0
    clip = _Clip(grad_clip)
    make_ready: Callable[[], None] = _nothing
    if engine.zero_optimization_stage() == 3:
        _at_stage_3(zero, clip)
    elif zero.cpu_offload:
        _at_stages_1_and_2_with_offload(zero, clip)
    else:
        make_ready = _at_stages_1_and_2(zero, clip)
    plain_step = zero.step

    def step(closure: None = None) -> None:
        clip.norm = math.inf
        make_ready()
        plain_step(closure)
        zero._global_grad_norm = clip.norm

    zero.step = step


def _nothing() -> None:
    pass


def _at_stage_3(zero: Any, clip: _Clip) -> None:
    """In the look for what is not finite, which DeepSpeed takes before Muon, but in fp16 alone."""
    begin = zero._overflow_check_and_loss_scale_update

    def look(update_scale: bool = True) -> bool:
        begin(update_scale=False)
        zero.check_overflow()
        if not zero.overflow:
            factor = clip.factor(zero._get_norm_groups())
            zero.overflow = math.isnan(factor)
            if factor < 1:
                held = [flat.grad for flat in zero.fp32_partitioned_groups_flat]
                if not zero.offload_optimizer:
                    held = [g for pieces in zero.averaged_gradients.values() for g in pieces]
                torch._foreach_mul_(held, factor)
        return bool(
            zero._loss_scale_update_and_overflow_cleanup() if update_scale else zero.overflow
        )

    zero._overflow_check_and_loss_scale_update = look


def _at_stages_1_and_2_with_offload(zero: Any, clip: _Clip) -> None:
    """Right before Muon, which is part of the step there."""
    plain_updates = zero._apply_muon_updates_cpu_offload

    def updates() -> None:
        factor = clip.factor([zero.scaled_global_norm()])
        if math.isnan(factor):
            return  # DeepSpeed takes the same norm next, and skips the step
        if factor < 1:
            torch._foreach_mul_([f.grad for f in zero.single_partition_of_fp32_groups], factor)
        plain_updates()

    zero._apply_muon_updates_cpu_offload = updates


def _at_stages_1_and_2(zero: Any, clip: _Clip) -> Callable[[], None]:
    """Put Muon off until every group's gradients are there; what then makes them ready to step.

    DeepSpeed calls `get_flat_partition` group by group as soon as each is reduced. It takes whole
    parameters' gradients, makes Muon's updates of them and cuts out this rank's pieces.
    """
    cut = zero.get_flat_partition
    waiting: dict[int, tuple[list[torch.Tensor], Callable[[], list[torch.Tensor]]]] = {}

    def put_off(parameters: Any, *place: Any, param_group_idx: int, **how: Any) -> list[Any]:
        waiting[param_group_idx] = (
            zero.all_grad_tensors[param_group_idx],
            lambda: cut(parameters, *place, param_group_idx=param_group_idx, **how),
        )
        return []

    def make_ready() -> None:
        assert len(waiting) == len(zero.bit16_groups), "gradients that were not clipped"
        factor = clip.factor([_norm(zero, i, gradients) for i, (gradients, _) in waiting.items()])
        for index, (gradients, pieces) in waiting.items():
            if gradients and factor != 1:
                torch._foreach_mul_(gradients, factor)
            zero.all_grad_tensors[index] = gradients
            zero.averaged_gradients[index] = pieces()
            zero.all_grad_tensors[index] = None
        waiting.clear()

    zero.get_flat_partition = put_off
    return make_ready


def _norm(zero: Any, group: int, gradients: list[torch.Tensor]) -> torch.Tensor:
    """Of one group's whole gradient, each rank giving its own slices. A collective."""
    slices, parameters = [], zero.params_in_partition[group]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        own = parameter._hp_mapping.lp_fragment_address
        slices.append(gradient.reshape(-1).narrow(0, own.start, own.numel))
    norm: torch.Tensor = zero.get_grad_norm_direct(slices, parameters)
    return norm

"""The door to DeepSpeed's engine: how it is set, built, given gradients and stepped.

What its ZeRO stages do differently is kept here, so that the trainer sees one engine: any number of
backward calls, then one step that says whether it was applied and how large the gradient was.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from pipeline.config import RunConfig
from pipeline.config_checks import micro_batch_size
from pipeline.deepspeed_file import offloads, zero_stage
from pipeline.optim.before_muon import look_before_muon
from pipeline.optim.muon import muon_settings


@dataclass(frozen=True)
class Outcome:
    """What became of one optimizer step."""

    applied: bool  # False: a gradient was not finite on some rank, and no weight moved
    grad_norm: float  # of the whole gradient before clipping


def deepspeed_settings(
    config: RunConfig, file_settings: Mapping[str, Any], world_size: int
) -> dict[str, Any]:
    """DeepSpeed's whole configuration: the file's ZeRO settings and the run's own."""
    stage = zero_stage(file_settings)
    settings = {
        **file_settings,
        "train_micro_batch_size_per_gpu": micro_batch_size(config, world_size),
        "gradient_accumulation_steps": 1,
        # `step` ends the batch, after any number of micro-batches and loss chunks. At stages 2 and
        # 3 each backward reduces at once into the rank's own slice: never a full copy of the
        # gradients.
        "managed_gradient_accumulation": False,
        # At stage 0 DeepSpeed would clip and never say by what, nor look whether it was finite.
        "gradient_clipping": config.grad_clip if stage else 0.0,
        "zero_allow_untested_optimizer": True,
        # Stage 1 takes each pass's bf16 gradients into its fp32 sums at once, and frees them; it
        # would free them in hooks of `engine.forward` otherwise (see `backward`).
        "bf16": {"enabled": config.precision == "bf16", "immediate_grad_update": True},
    }
    if config.precision == "bf16" and stage:
        # Sums over chunks and micro-batches would lose their small parts in bf16.
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    if offloads(file_settings):
        # Its own CPU Adam is compiled on first use, and its step is not ours.
        settings["zero_force_ds_cpu_optimizer"] = False
    if config.optimizer == "muon":
        settings = muon_settings(settings, config.precision)
    return settings


def build_engine(
    make_model: Callable[[], nn.Module],
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    config: RunConfig,
    file_settings: Mapping[str, Any],
) -> Any:
    """The engine of a run."""
    model = build_model(make_model, config, file_settings)
    optimizer = make_optimizer(model)
    if zero_stage(file_settings) == 0:
        _guard(optimizer, config.grad_clip)
    settings = deepspeed_settings(config, file_settings, dist.get_world_size())
    engine = start_engine(model, optimizer, settings)
    if config.optimizer == "muon" and zero_stage(file_settings):
        look_before_muon(engine, config.grad_clip)
    return engine


def build_model(
    make_model: Callable[[], nn.Module], config: RunConfig, file_settings: Mapping[str, Any]
) -> nn.Module:
    """The model of a run, its weights drawn from torch's global generator.

    At stage 3 each module is cut into the ranks' slices as soon as it is made, so that no rank ever
    holds the whole model; the values are those of a model made whole.
    """
    import deepspeed

    settings = deepspeed_settings(config, file_settings, dist.get_world_size())
    with deepspeed.zero.Init(config_dict_or_path=settings, enabled=zero_stage(file_settings) == 3):
        return make_model()


def start_engine(
    model: nn.Module, optimizer: torch.optim.Optimizer, settings: Mapping[str, Any]
) -> Any:
    """A DeepSpeed engine around `model` and `optimizer`, with DeepSpeed's whole configuration."""
    import deepspeed

    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=dict(settings), dist_init_required=False
    )
    return engine


def _guard(optimizer: torch.optim.Optimizer, grad_clip: float) -> None:
    """Make `optimizer`, which holds whole parameters, clip and refuse as ZeRO's stages do.

    Through the two attributes that the engine reads of its optimizers.
    """
    plain_step = optimizer.step

    def step(closure: None = None) -> None:
        gradients = list(_gradients(optimizer))
        norm = float(nn.utils.get_total_norm(gradients))
        optimizer._global_grad_norm = norm  # type: ignore[attr-defined]
        optimizer.overflow = not math.isfinite(norm)  # type: ignore[attr-defined]
        if not math.isfinite(norm):
            return
        if grad_clip and norm > grad_clip:
            torch._foreach_mul_(gradients, grad_clip / (norm + 1e-6))
        plain_step()

    optimizer.step = step  # type: ignore[method-assign,assignment]


def _gradients(optimizer: torch.optim.Optimizer) -> Iterable[torch.Tensor]:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                yield parameter.grad


def backward(engine: Any, loss: torch.Tensor) -> None:
    """Add `loss`'s gradients to those of this step; any number of times before `step`."""
    if engine.zero_optimization():
        # DeepSpeed notes where a backward pass begins in hooks of `engine.forward`, which losses
        # that come in chunks do not pass through. Without the first each pass would overwrite the
        # one before at stage 3; without the second, buckets that fill up before the pass is over
        # would be taken for the step's last at stages 1 and 2 with offload, and lost.
        engine.optimizer.clear_backward_seen_flag()
        engine.optimizer.set_gradient_accumulation_boundary(False)
    engine.backward(loss, scale_wrt_gas=False)


def step(engine: Any) -> Outcome:
    """Clip, and move the weights unless a gradient is not finite."""
    engine.step()
    norm = engine.get_global_grad_norm()
    _forget_gradients(engine.optimizer)
    return Outcome(
        applied=bool(engine.was_step_applied()),
        grad_norm=float("nan") if norm is None else float(norm),
    )


def _forget_gradients(optimizer: Any) -> None:
    """Zero the buffers that DeepSpeed sums a step's gradients in, where it would not.

    Stage 3, and stages 1 and 2 with offload, copy a step's first backward pass into them and add
    those after it. A parameter that no loss of the first pass depends on (what ENTP's chunks share
    has its gradient with the last) would be added to the step before.
    """
    buffer = getattr(optimizer, "grad_partitions_flat_buffer", None)
    if buffer is not None:
        buffer.zero_()
    for kept in getattr(optimizer, "accumulated_grads_in_cpu", {}).values():
        kept.zero_()

"""The optimizer of a run, over parameters that ZeRO-3 may already have partitioned."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pipeline.config import RunConfig


def build_optimizer(model: nn.Module, config: RunConfig) -> torch.optim.Optimizer:
    """AdamW with decoupled decay on matrices only; gains and biases are left alone.

    torch's own: element-wise, so the flat shard that ZeRO hands it changes nothing, and DeepSpeed's
    would be compiled on first use.
    """
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            shape = getattr(parameter, "ds_shape", parameter.shape)
            (matrices if len(shape) > 1 else vectors).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=1e-8,
        fused=True,
    )

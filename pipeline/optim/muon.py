"""Muon through DeepSpeed's own implementation, with what its ZeRO stages need set for the user.

Hidden matrices are stepped by Muon (momentum, orthogonalised by Newton-Schulz, times
√max(1, rows/columns)), embeddings and vectors by AdamW at a rate of their own. DeepSpeed's ZeRO
orthogonalises whole gradients before its optimizer sees flat shards; it does so for the parameters
that carry `use_muon`, at stage 3 without reduce-scatter.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from models.layers import TiedEmbedding
from pipeline.config import RunConfig


def hidden_matrices(model: nn.Module) -> set[int]:
    """The ids of the parameters that Muon is for: matrices that are no embedding, nor the head."""
    embeddings = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, (nn.Embedding, TiedEmbedding))
        for parameter in module.parameters(recurse=False)
    }
    return {
        id(parameter)
        for parameter in model.parameters()
        if len(getattr(parameter, "ds_shape", parameter.shape)) == 2
        and id(parameter) not in embeddings
    }


def build_muon(model: nn.Module, config: RunConfig) -> torch.optim.Optimizer:
    """Muon for hidden matrices, AdamW for the rest, tagged as DeepSpeed's ZeRO reads them."""
    from deepspeed.runtime.zero.muon import muon_optimizer

    hidden = hidden_matrices(model)
    parts: dict[str, list[nn.Parameter]] = {"hidden": [], "matrices": [], "vectors": []}
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        parameter.use_muon = id(parameter) in hidden  # type: ignore[attr-defined]
        shape = getattr(parameter, "ds_shape", parameter.shape)
        kind = "matrices" if len(shape) > 1 else "vectors"
        parts["hidden" if id(parameter) in hidden else kind].append(parameter)
    adam: dict[str, Any] = {
        "use_muon": False,
        "lr": config.adam_lr,
        "lr_scale": config.adam_lr / config.lr if config.lr else 0.0,
        "betas": (config.beta1, config.beta2),
        "eps": 1e-8,
    }
    groups: list[dict[str, Any]] = [
        {
            "params": parts["hidden"],
            "use_muon": True,
            "lr": config.lr,
            "momentum": config.momentum,
            "ns_method": config.ns_method,
            "weight_decay": config.weight_decay,
        },
        {"params": parts["matrices"], "weight_decay": config.weight_decay, **adam},
        {"params": parts["vectors"], "weight_decay": 0.0, **adam},
    ]
    optimizer: torch.optim.Optimizer = muon_optimizer.MuonWithAuxAdam(
        [group for group in groups if group["params"]]
    )
    return optimizer


def muon_settings(settings: dict[str, Any], precision: str) -> dict[str, Any]:
    """DeepSpeed's configuration with what Muon needs."""
    zero = dict(settings["zero_optimization"])
    if zero["stage"] == 3:
        zero["reduce_scatter"] = False
    changed = {**settings, "zero_optimization": zero}
    if precision == "bf16":
        # Stage 3 keeps the momentum in the numbers that it communicates in.
        changed.setdefault("communication_data_type", "fp32")
    if zero["stage"] == 2:
        # There sums in fp32 are kept apart from Muon's, and lost where a bucket holds a vector
        # before a matrix of the same rank; `bind_muon` has another way to them.
        changed.pop("data_types", None)
    return changed


def bind_muon(engine: Any) -> None:
    """Keep the momentum in fp32, and the sums of several backward passes.

    At stages 1 and 2 DeepSpeed 0.19.8 keeps both in the numbers that the parameters are in, but for
    its optimizer of bf16 at stage 1, which knows `bf16_groups`.
    """
    zero = engine.optimizer
    if engine.zero_optimization_stage() not in (1, 2) or hasattr(zero, "bf16_groups"):
        return
    as_reduced = zero.get_all_grad_tensors

    def in_fp32(parameters: list[nn.Parameter], dtype: torch.dtype) -> list[torch.Tensor]:
        return [gradient.float() for gradient in as_reduced(parameters, dtype)]

    zero.get_all_grad_tensors = in_fp32

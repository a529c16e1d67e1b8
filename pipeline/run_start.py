"""Where a run starts, at step 0: weights that its seed draws, or those of the run it goes on from.

A run that goes bad before its first checkpoint returns there. Nothing is kept for it: what the seed
drew once it draws again, so that the start costs no disk and no time.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from models.registry import build
from pipeline import checkpoint, zero_layout
from pipeline.config import RunConfig
from pipeline.distributed import World
from pipeline.engine import build_model
from pipeline.plan import resolve_model


@dataclass(frozen=True)
class RunStart:
    """The start of one run.

    Attributes:
        config: of the run.
        vocab_size: of its model.
        ds_settings: of its ds_config.
        parent: the checkpoint whose weights it takes; None where its seed draws them.
    """

    config: RunConfig
    vocab_size: int
    ds_settings: dict[str, Any]
    parent: Path | None = None

    def make_model(self) -> nn.Module:
        """The run's model, its weights drawn from torch's global generator."""
        return build(resolve_model(self.config, self.vocab_size))

    def inherit(self, engine: Any, world: World) -> dict[str, Any]:
        """Give an engine the parent's weights, if there is one; the record of step 0.

        Raises UserError where the parent's checkpoint cannot be read.
        """
        if self.parent is None:
            return {"step": 0, "totals": {}}
        inherited = checkpoint.load(engine, self.parent, world, weights_only=True)
        return {"step": 0, "totals": inherited["totals"]}

    def return_to(self, engine: Any, world: World) -> dict[str, Any]:
        """Bring an engine that has stepped back to step 0; the record of it. A collective.

        It needs what the start needed: at ZeRO-3 the rank's slices of another model, below that a
        whole model in CPU memory. Raises UserError as `inherit`.
        """
        zero_layout.reset_optimizer(engine)
        if self.parent is None:
            torch.manual_seed(self.config.seed)
            _copy_weights(build_model(self.make_model, self.config, self.ds_settings), engine)
            gc.collect()  # modules refer to each other in circles
        return self.inherit(engine, world)


def _copy_weights(model: nn.Module, engine: Any) -> None:
    """Give the engine's masters and working parameters the values that `model` has."""
    held = {fragment.name: fragment for fragment in zero_layout.fragments(engine)}
    working = next(engine.module.parameters()).dtype
    for name, whole in zero_layout.whole_parameters(model, engine.zero_optimization_stage()):
        if name in held:
            fragment = held[name]
            part = whole.view(-1).narrow(0, fragment.start, fragment.length)
            # DeepSpeed makes its masters of the parameters that the model computes with.
            fragment.of(fragment.flat.detach()).copy_(part.to(working))
    zero_layout.publish_masters(engine)

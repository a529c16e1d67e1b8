"""What the rest of the house knows of an architecture without building it.

A module that `models/registry.py` names holds one of these as `ARCHITECTURE`. Everything that asks
(configs, FLOPs, objectives, commands) asks here, so that a new architecture is its own file and a
line in the registry. This module does not import torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from models.config import ModelConfig
    from models.kept import Round
    from models.operations import Operation, Pass
    from models.parameter_counts import BodyParameters
    from models.parameter_shapes import Shapes
    from models.shapes import Shape


def _nothing_derived(shape: Shape, num_heads: int) -> Mapping[str, Any]:
    return {}


def _scored(config: ModelConfig, step: Pass) -> int:
    return step.scored


def _no_problems(config: ModelConfig) -> Iterable[str]:
    return ()


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """One architecture: how it is described, built and counted."""

    model: str
    """Its LanguageModel as "module:Class"; imported when one is built."""
    operations: Callable[[ModelConfig, Pass], Iterable[Operation]]
    """The matrix products of one forward pass, those of the head excepted."""
    parameters: Callable[[ModelConfig], BodyParameters]
    """Numbers of parameters, those of the embeddings excepted."""
    shapes: Callable[[ModelConfig], Shapes] | None = None
    """Names and shapes of its parameters in the model's order, those of the embeddings excepted;
    None: `isoflop plan` cannot plan it."""
    kept: Callable[[ModelConfig, int, Pass], Iterable[Round]] | None = None
    """(config, rows, pass of each) → what each backward call of a micro-batch keeps, or of a pass
    that is not for training what is computed at once; where they differ, only the largest need be
    given. None: `isoflop plan` cannot plan it."""
    logit_positions: Callable[[ModelConfig, Pass], int] = _scored
    """Positions that one pass computes logits for; all that are scored, or a sample."""
    style: Mapping[str, Any] = field(default_factory=dict)
    """Fields of ModelConfig that its own paper or code prescribes, over the defaults."""
    derived: Callable[[Shape, int], Mapping[str, Any]] = _nothing_derived
    """(named shape, heads) → further fields of ModelConfig, such as the depths of two stacks."""
    fields: frozenset[str] = frozenset()
    """Fields of ModelConfig that not every architecture has and this one does."""
    problems: Callable[[ModelConfig], Iterable[str]] = _no_problems
    """What it cannot be: one line for each, naming field, value and remedy."""
    encodes_prefix: bool = False
    """The first part of a sample goes to an encoder (`Batch.encoder_ids`); the rest is scored."""
    has_prefix_mask: bool = False
    """Leading tokens can see each other in both directions (`Batch.prefix_lengths`)."""
    has_document_mask: bool = False
    """Attention can be kept inside documents (`Batch.document_ids`)."""
    is_finetuned: bool = True
    """Finetuned on instructions."""

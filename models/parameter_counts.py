"""Numbers of parameters of the parts that architectures are composed of. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from models.parameter_shapes import (
    attention_shapes,
    block_shapes,
    count,
    feed_forward_shapes,
    linear_shapes,
    norm_shapes,
)

if TYPE_CHECKING:
    from models.config import ModelConfig


@dataclass(frozen=True)
class BodyParameters:
    """What an architecture holds beside its embeddings."""

    active: int
    """What a target token's own forward pass multiplies by."""
    idle: int = 0
    """What it does not: an encoder that reads the source alone, the projections of that source's
    keys and values, and what only a loss asks for."""


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters; tied weights once."""

    total: int
    non_embedding: int
    """Without token and position embeddings."""
    active: int
    """Those that a target token's own forward pass multiplies by, the tied head included: no
    position that is looked up, and nothing that only a source's tokens meet."""


def embedding_parameters(config: ModelConfig) -> tuple[int, int]:
    """Of tokens, and of learned positions."""
    return config.vocab_size * config.d_model, config.position_rows * config.d_model


def norm_parameters(config: ModelConfig) -> int:
    """Of one norm over d_model."""
    return count(norm_shapes(config))


def attention_parameters(config: ModelConfig, *, cross: bool = False) -> int:
    """Of one attention's four projections."""
    return count(attention_shapes(config, cross=cross))


def source_parameters(config: ModelConfig) -> int:
    """Of one cross-attention's projections of its source: keys and values."""
    return 2 * count(linear_shapes(config.d_model, config.kv_width(cross=True), config))


def feed_forward_parameters(config: ModelConfig) -> int:
    """Of one feed-forward."""
    return count(feed_forward_shapes(config))


def block_parameters(config: ModelConfig) -> int:
    """Of one block: self-attention, feed-forward and a norm before each."""
    return count(block_shapes(config))

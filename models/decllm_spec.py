"""DecLLM without torch: its operations and its parameters. The model is models/decllm.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from models.architecture import Architecture
from models.kept import Amount, Round, block, final_norm, rotary
from models.operations import Operation, Pass, feed_forward, self_attention
from models.parameter_counts import BodyParameters, block_parameters, norm_parameters
from models.parameter_shapes import Shapes, inside, norm_shapes, stack

if TYPE_CHECKING:
    from models.config import ModelConfig


def operations(config: ModelConfig, step: Pass) -> Iterator[Operation]:
    """One stack; each new token attends to itself and to what is cached."""
    for _ in range(config.num_layers):
        yield from self_attention(
            config,
            step.tokens,
            cached=step.cached,
            hidden_pairs=step.hidden_pairs(),
            skipped_pairs=step.skipped_pairs(),
        )
        yield from feed_forward(config, step.tokens)


def parameters(config: ModelConfig) -> BodyParameters:
    """Blocks and the final norm, and the one that positional subtraction may have."""
    blocks = config.num_layers * block_parameters(config)
    norms = 1 + config.positional_subtraction_norm
    return BodyParameters(active=blocks + norms * norm_parameters(config))


def shapes(config: ModelConfig) -> Shapes:
    """As models/decllm.py makes them."""
    if config.positional_subtraction_norm:
        yield from inside("subtraction_norm", norm_shapes(config))
    yield from stack("blocks", config.num_layers, config)
    yield from inside("final_norm", norm_shapes(config))


def kept(config: ModelConfig, rows: int, step: Pass) -> Iterator[Round]:
    """Every block of the one stack, at once."""
    positions, turns = rows * step.tokens, rotary(config, step.tokens)
    blocks = [block(config, f"blocks.{i}", positions) for i in range(config.num_layers)]
    yield Round(
        segments=(*blocks, final_norm(config, positions)),
        states=positions,
        scored=rows * step.scored,
        beside=turns + subtracted(config, positions),
        carried=turns,
    )


def subtracted(config: ModelConfig, positions: int) -> Amount:
    """What a norm after positional subtraction keeps: the difference."""
    return Amount(positions * config.d_model * config.positional_subtraction_norm)


ARCHITECTURE = Architecture(
    model="models.decllm:DecLLM",
    operations=operations,
    parameters=parameters,
    shapes=shapes,
    kept=kept,
    fields=frozenset(
        {"restart_positions", "positional_subtraction", "positional_subtraction_norm"}
    ),
    has_prefix_mask=True,
    has_document_mask=True,
)

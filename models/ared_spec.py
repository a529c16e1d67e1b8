"""ARED without torch: what it prescribes, its operations and its parameters.

The model is models/ared.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from models.architecture import Architecture
from models.kept import Amount, Round, block, final_norm, norm, plain, rotary
from models.operations import (
    Operation,
    Pass,
    cross_attention,
    feed_forward,
    once,
    self_attention,
)
from models.parameter_counts import (
    BodyParameters,
    attention_parameters,
    block_parameters,
    norm_parameters,
)
from models.parameter_shapes import Shapes, inside, linear_shapes, norm_shapes, stack
from models.shapes import GPT2

if TYPE_CHECKING:
    from models.config import ModelConfig
    from models.shapes import Shape


def operations(config: ModelConfig, step: Pass) -> Iterator[Operation]:
    """A causal encoder, the bridge, and decoder blocks that read the encoder causally too."""
    tokens, hidden, skipped = step.tokens, step.hidden_pairs(), step.skipped_pairs()
    own = list(
        self_attention(
            config, tokens, cached=step.cached, hidden_pairs=hidden, skipped_pairs=skipped
        )
    )
    for _ in range(config.num_encoder_layers):
        yield from own
        yield from feed_forward(config, tokens)
    yield once("bridge", 2 * tokens * config.d_model**2)
    for _ in range(config.num_layers):
        yield from own
        yield from cross_attention(
            config,
            tokens,
            step.context,
            new_source=tokens,
            hidden_pairs=hidden,
            skipped_pairs=skipped,
        )
        yield from feed_forward(config, tokens)


def parameters(config: ModelConfig) -> BodyParameters:
    """Both stacks and the bridge, which every token runs through, and the norms of the embedding
    loss.

    A decoder block norms what it reads of the encoder with gains of its own.
    """
    norm, block = norm_parameters(config), block_parameters(config)
    bridge = config.d_model * (config.d_model + config.bias) + norm * config.bridge_norm
    loss_norms = 0
    if config.embedding_loss != "none" and config.embedding_loss_affine:
        loss_norms = config.embedding_encoder_norm + (config.embedding_mean_norm != "none")
    crossed = attention_parameters(config, cross=True) + 2 * norm
    return BodyParameters(
        active=config.num_encoder_layers * block
        + bridge
        + config.num_layers * (block + crossed)
        + norm * (1 + config.positional_subtraction_norm),
        idle=loss_norms * 2 * config.d_model,
    )


def shapes(config: ModelConfig) -> Shapes:
    """As models/ared.py makes them."""
    d = config.d_model
    if config.positional_subtraction_norm:
        yield from inside("subtraction_norm", norm_shapes(config))
    yield from stack("encoder", config.num_encoder_layers, config)
    if config.bridge_norm:
        yield from inside("bridge_norm", norm_shapes(config))
    yield from inside("bridge", linear_shapes(d, d, config))
    yield from stack("decoder", config.num_layers, config, cross=True, norm_source=True)
    yield from inside("final_norm", norm_shapes(config))
    if config.embedding_loss != "none" and config.embedding_loss_affine:
        norms = ["mean_norm"] * (config.embedding_mean_norm != "none")
        for name in [*norms, *["encoded_norm"] * config.embedding_encoder_norm]:
            yield f"{name}.weight", (d,)
            yield f"{name}.bias", (d,)


def kept(config: ModelConfig, rows: int, step: Pass) -> Iterator[Round]:
    """Both stacks at once; the encoder's output, which the bridge and every decoder block read,
    once, and the embedding loss's difference."""
    positions, d = rows * step.tokens, config.d_model
    bridge = Amount(positions * d)
    if config.bridge_norm:
        bridge += Amount(positions * d) + norm(config, positions)
    segments = [
        *(block(config, f"encoder.{i}", positions) for i in range(config.num_encoder_layers)),
        plain("bridge", bridge, Amount(positions * d)),
        *(
            block(config, f"decoder.{i}", positions, source=positions, norm_source=True)
            for i in range(config.num_layers)
        ),
        final_norm(config, positions),
    ]
    after_head = Amount()
    if config.embedding_loss != "none":
        # Embeddings normed, their sums and means, the encoder's normed, and the difference.
        after_head = Amount(5 * positions * d)
    turns = rotary(config, step.tokens) + rotary(config, step.tokens, config.cross_head_dim)
    yield Round(
        segments=tuple(segments),
        states=positions,
        scored=rows * step.scored,
        beside=turns + Amount(positions * d * config.positional_subtraction_norm),
        # Embeddings and the encoder's output are there until the end.
        carried=turns + Amount(2 * positions * d),
        after_head=after_head,
    )


def problems(config: ModelConfig) -> Iterator[str]:
    """What an ARED cannot be."""
    if config.num_encoder_layers < 1:
        yield f"num_encoder_layers={config.num_encoder_layers}: too small; give at least 1"


def depths_and_heads(shape: Shape, num_heads: int) -> Mapping[str, Any]:
    """Stacks of one depth, and in cross-attention twice the heads, as published."""
    return {
        "num_layers": shape.num_paired_layers,
        "num_encoder_layers": shape.num_paired_layers,
        "num_cross_heads": 2 * num_heads,
    }


ARCHITECTURE = Architecture(
    model="models.ared:ARED",
    operations=operations,
    parameters=parameters,
    shapes=shapes,
    kept=kept,
    style={
        **GPT2,
        "bias": False,
        # Positional subtraction works on the embedding's own scale.
        "scale_embedding": False,
        "positional_subtraction": True,
        "embedding_loss": "mse",
        "embedding_loss_coefficient": 8.0,
    },
    derived=depths_and_heads,
    fields=frozenset(
        {
            "num_encoder_layers",
            "num_cross_heads",
            "num_cross_kv_heads",
            "cross_attention_first",
            "restart_positions",
            "positional_subtraction",
            "positional_subtraction_norm",
            "bridge_norm",
            "bridge_next_position",
            "embedding_loss",
            "embedding_loss_coefficient",
            "embedding_loss_affine",
            "embedding_loss_detach",
            "embedding_encoder_norm",
            "embedding_mean_norm",
        }
    ),
    problems=problems,
    has_document_mask=True,
    is_finetuned=False,
)

"""RedLLM without torch: what it prescribes, its operations and its parameters.

The model is models/redllm.py.
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
    merged_attention,
    self_attention,
)
from models.parameter_counts import (
    BodyParameters,
    attention_parameters,
    block_parameters,
    norm_parameters,
    source_parameters,
)
from models.parameter_shapes import Shapes, inside, norm_shapes, stack

if TYPE_CHECKING:
    from models.config import ModelConfig
    from models.shapes import Shape


def operations(config: ModelConfig, step: Pass) -> Iterator[Operation]:
    """A bidirectional encoder, and decoder blocks that read it.

    What of the source is cached is neither encoded nor projected again.
    """
    new_source = 0 if step.is_source_cached else step.source
    if new_source:
        for _ in range(config.num_encoder_layers):
            apart = step.source_skipped_pairs()
            yield from self_attention(config, new_source, hidden_pairs=apart, skipped_pairs=apart)
            yield from feed_forward(config, new_source)
    for _ in range(config.num_layers):
        yield from _decoder_attention(config, step, new_source)
        yield from feed_forward(config, step.tokens)


def _decoder_attention(config: ModelConfig, step: Pass, new_source: int) -> Iterator[Operation]:
    hidden, crossed = step.hidden_pairs(), step.crossed_pairs()
    if config.merged_attention:
        yield from merged_attention(
            config,
            step.tokens,
            step.source,
            new_source=new_source,
            cached=step.cached,
            hidden_pairs=hidden + crossed,
        )
        return
    yield from self_attention(
        config,
        step.tokens,
        cached=step.cached,
        hidden_pairs=hidden,
        skipped_pairs=step.skipped_pairs(),
    )
    yield from cross_attention(
        config, step.tokens, step.source, new_source=new_source, hidden_pairs=crossed
    )


def parameters(config: ModelConfig) -> BodyParameters:
    """Both stacks and their final norms.

    A target token meets neither the encoder nor cross-attention's keys and values; merged
    attention's are its own too.
    """
    norm, block = norm_parameters(config), block_parameters(config)
    crossed = of_source = 0
    if not config.merged_attention:
        of_source = source_parameters(config)
        crossed = attention_parameters(config, cross=True) + norm - of_source
    encoder = config.num_encoder_layers * block + norm * config.encoder_final_norm
    return BodyParameters(
        active=config.num_layers * (block + crossed) + norm,
        idle=encoder + config.num_layers * of_source,
    )


def shapes(config: ModelConfig) -> Shapes:
    """As models/redllm.py makes them."""
    yield from stack("encoder", config.num_encoder_layers, config)
    if config.encoder_final_norm:
        yield from inside("encoder_norm", norm_shapes(config))
    yield from stack("decoder", config.num_layers, config, cross=True)
    yield from inside("final_norm", norm_shapes(config))


def kept(config: ModelConfig, rows: int, step: Pass) -> Iterator[Round]:
    """Both stacks at once; the encoder's output, which every decoder block reads, once."""
    positions, source = rows * step.tokens, rows * step.source
    output = Amount(source * config.d_model)
    if config.encoder_final_norm:
        output += Amount(source * config.d_model) + norm(config, source)
    turns = rotary(config, step.tokens + step.source)
    turns += rotary(config, step.tokens + step.source, config.cross_head_dim)
    yield Round(
        segments=(
            *(block(config, f"encoder.{i}", source) for i in range(config.num_encoder_layers)),
            plain("encoder_norm", output, Amount(source * config.d_model)),
            *(
                block(config, f"decoder.{i}", positions, source=source)
                for i in range(config.num_layers)
            ),
            final_norm(config, positions),
        ),
        states=positions,
        scored=rows * step.scored,
        beside=turns,
        carried=turns + Amount(source * config.d_model),
    )


def problems(config: ModelConfig) -> Iterator[str]:
    """What a RedLLM cannot be."""
    if config.num_encoder_layers < 1:
        yield f"num_encoder_layers={config.num_encoder_layers}: too small; give at least 1"
    if config.positions != "rotary":
        yield (
            f"positions={config.positions!r}: RedLLM's positions run on from encoder to "
            "decoder, which is defined for rotary ones; give positions=rotary"
        )


def depths(shape: Shape, num_heads: int) -> Mapping[str, Any]:
    """Encoder and decoder of one depth, with about a decoder-only model's parameters."""
    return {"num_layers": shape.num_paired_layers, "num_encoder_layers": shape.num_paired_layers}


ARCHITECTURE = Architecture(
    model="models.redllm:RedLLM",
    operations=operations,
    parameters=parameters,
    shapes=shapes,
    kept=kept,
    style={"attention_output_norm": "head"},
    derived=depths,
    fields=frozenset(
        {
            "num_encoder_layers",
            "num_cross_heads",
            "num_cross_kv_heads",
            "cross_attention_first",
            "merged_attention",
            "encoder_final_norm",
            "restart_positions",
        }
    ),
    problems=problems,
    encodes_prefix=True,
    has_document_mask=True,
)

"""ENTP without torch: what it prescribes, its operations and its parameters.

The model is models/entp.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from models import decllm_spec, entp_kept
from models.architecture import Architecture
from models.kept import Round
from models.operations import (
    Operation,
    Pass,
    attention_width,
    feed_forward,
    once,
    output_projection,
    projections,
    self_attention,
)
from models.prefix_chunks import plan_chunks
from models.shapes import GPT2

if TYPE_CHECKING:
    from models.config import ModelConfig


def operations(config: ModelConfig, step: Pass) -> Iterator[Operation]:
    """models/entp.py, chunk by chunk. No attention of the upper layers is causal: every score is
    some prefix's. A generated token has its prefix run again from the first one's attention on, and
    of that what it adds to running sums.

    Where prefixes are sampled, what is counted is the mean over the draws, rounded.
    """
    if is_decoder(config):
        yield from decllm_spec.operations(config, step)
        return
    # Nothing is computed behind the last scored position, and of nothing one token.
    reached = step.tokens if step.scored or not step.training else 1
    causal = replace(step, tokens=reached, scored=0)
    for _ in range(config.entp_causal_layers):
        yield from self_attention(
            config, reached, cached=step.cached, hidden_pairs=causal.hidden_pairs()
        )
        yield from feed_forward(config, reached)
    yield once("first layer: projections", projections(config, reached, reached))
    if step.cached:
        seen = 4 * step.tokens * step.context + 2 * step.cached
        yield Operation("first layer: running sums", seen * attention_width(config))
        yield from _pairs(config, step.context, step.context**2, step.scored)
    else:
        yield from _prefixes(config, step)


def is_decoder(config: ModelConfig) -> bool:
    """Whether a single layer is not causal, of which only what a decoder sees is read."""
    return config.entp_causal_layers == config.num_layers - 1


def logit_positions(config: ModelConfig, step: Pass) -> int:
    """The scored positions, or as many as are sampled of them."""
    sampled = config.entp_sampled_prefixes
    if is_decoder(config) or not step.training or not 0 < sampled < step.tokens:
        return step.scored
    return min(sampled, step.scored)


def _prefixes(config: ModelConfig, step: Pass) -> Iterator[Operation]:
    """All that is computed for each prefix."""
    lengths = range(step.context - step.scored + 1, step.context + 1)
    if not step.training:
        yield from _scan(config, step.context)
        yield from _pairs(config, sum(lengths), sum(n**2 for n in lengths), len(lengths))
        return
    sampled = config.entp_sampled_prefixes
    is_sampled = 0 < sampled < step.tokens
    if is_sampled and sampled < step.scored:
        # Every row is linear in the sums over the sample, whose mean is a share of all.
        pairs, squares = sum(lengths), sum(length**2 for length in lengths)
        whole = [
            Operation("first layer: attention", 4 * squares * attention_width(config)),
            *_pairs(config, pairs, squares, step.scored),
        ]
        for row in whole:
            yield replace(row, forward=round(row.forward * sampled / step.scored))
        return
    yield from _scan(config, step.tokens if step.scored else 1)
    numbered = [None] * (0 if is_sampled else step.tokens - step.scored) + [*lengths]
    chunks = plan_chunks(step.rows, step.tokens, config.entp_chunk_pairs, sampled)
    for chunk in chunks:
        if not chunk.first_row:
            # A chunk without a scored prefix still runs one token.
            part = [*filter(None, numbered[chunk.start : chunk.stop])] or [1]
            yield from _pairs(config, sum(part), sum(n**2 for n in part), len(part))


def _scan(config: ModelConfig, tokens: int) -> Iterator[Operation]:
    """The first layer's attention in all prefixes of `tokens`."""
    scores = 2 * tokens**2 * attention_width(config)
    yield once("first layer: scores", scores)
    yield once("first layer: entry", scores)


def _pairs(config: ModelConfig, pairs: int, squares: int, prefixes: int) -> Iterator[Operation]:
    """What follows the first layer's attention: `pairs` and `squares` are the sums of the
    prefixes' lengths and of their squares."""
    width = attention_width(config)
    yield Operation("self-attention output", output_projection(config, pairs))
    yield from feed_forward(config, pairs)
    for _ in range(config.num_layers - config.entp_causal_layers - 2):
        yield Operation("self-attention projections", projections(config, pairs, pairs))
        yield Operation("self-attention", 4 * squares * width)
        yield Operation("self-attention output", output_projection(config, pairs))
        yield from feed_forward(config, pairs)
    if absorbs(config):
        per_prefix = 2 * prefixes * width * config.d_model
        yield Operation("last layer: query", per_prefix)
        yield Operation("last layer: absorbed key and value", 2 * per_prefix)
        yield Operation("last layer: attention", 4 * pairs * config.num_heads * config.d_model)
    else:
        yield Operation("last layer: projections", projections(config, prefixes, pairs))
        yield Operation("last layer: attention", 4 * pairs * width)
    yield Operation("last layer: output", output_projection(config, prefixes))
    yield from feed_forward(config, prefixes)


def kept(config: ModelConfig, rows: int, step: Pass) -> Iterator[Round]:
    """The largest of the chunks."""
    if is_decoder(config):
        yield from decllm_spec.kept(config, rows, step)
    else:
        yield from entp_kept.kept(config, rows, step, absorbs=absorbs(config))


def problems(config: ModelConfig) -> Iterator[str]:
    """More causal layers than leave a bidirectional one."""
    if config.entp_causal_layers >= config.num_layers:
        yield (
            f"entp_causal_layers={config.entp_causal_layers}: leaves none of "
            f"num_layers={config.num_layers} for the prefixes; give at most {config.num_layers - 1}"
        )


def absorbs(config: ModelConfig) -> bool:
    """Whether the last layer's keys and values are plain linear maps with a head each, so that
    query and output can absorb them."""
    plain = not config.qkv_norm and config.positions == "learned"
    return plain and config.num_kv_heads == config.num_heads


ARCHITECTURE = Architecture(
    model="models.entp:ENTP",
    operations=operations,
    # Name by name a DecLLM's.
    parameters=decllm_spec.parameters,
    shapes=decllm_spec.shapes,
    kept=kept,
    logit_positions=logit_positions,
    style=GPT2,
    fields=frozenset({"entp_causal_layers", "entp_sampled_prefixes"}),
    problems=problems,
    has_document_mask=False,
    is_finetuned=False,
)

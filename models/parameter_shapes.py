"""Names and shapes of the parameters of the parts that architectures are composed of.

In the order in which a built model lists them, so that what ZeRO makes of them can be told without
building one. Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from models.config import ModelConfig

Shapes = Iterator[tuple[str, tuple[int, ...]]]
"""(name, shape) of each parameter, in order."""


def count(shapes: Iterable[tuple[str, tuple[int, ...]]]) -> int:
    """Elements of all."""
    return sum(math.prod(shape) for _, shape in shapes)


def inside(module: str, shapes: Shapes) -> Shapes:
    """`shapes` as those of the submodule of that name."""
    for name, shape in shapes:
        yield f"{module}.{name}", shape


def stack(
    module: str, depth: int, config: ModelConfig, *, cross: bool = False, norm_source: bool = False
) -> Shapes:
    """Blocks in a list, as `block_shapes` has them."""
    for number in range(depth):
        block = block_shapes(config, cross=cross, norm_source=norm_source)
        yield from inside(f"{module}.{number}", block)


def embedding_shapes(config: ModelConfig) -> Shapes:
    """The tied embedding, and learned positions where there are any."""
    yield "embedding.weight", (config.vocab_size, config.d_model)
    if config.position_rows:
        yield "position_embedding.weight", (config.position_rows, config.d_model)


def norm_shapes(config: ModelConfig) -> Shapes:
    """Of one norm over d_model."""
    yield "weight", (config.d_model,)
    if config.norm == "layernorm" and config.bias:
        yield "bias", (config.d_model,)


def linear_shapes(fan_in: int, fan_out: int, config: ModelConfig) -> Shapes:
    """Of one linear layer."""
    yield "weight", (fan_out, fan_in)
    if config.bias:
        yield "bias", (fan_out,)


def attention_shapes(config: ModelConfig, *, cross: bool = False) -> Shapes:
    """Of one attention's four projections."""
    d, width = config.d_model, config.num_heads * config.head_dim
    kv_width = config.kv_width(cross=cross)
    for name, size in (("query", width), ("key", kv_width), ("value", kv_width)):
        yield from inside(name, linear_shapes(d, size, config))
    yield from inside("output", linear_shapes(width, d, config))


def feed_forward_shapes(config: ModelConfig) -> Shapes:
    """Of one feed-forward."""
    d, f = config.d_model, config.d_ffn
    if config.feed_forward == "swiglu":
        yield from inside("gate", linear_shapes(d, f, config))
    yield from inside("up", linear_shapes(d, f, config))
    yield from inside("down", linear_shapes(f, d, config))


def block_shapes(config: ModelConfig, *, cross: bool = False, norm_source: bool = False) -> Shapes:
    """Of one block: self-attention and feed-forward, a norm before each; with `cross` the attention
    to a source, where it is not merged, and with `norm_source` a norm of the source."""
    yield from inside("attention_norm", norm_shapes(config))
    yield from inside("attention", attention_shapes(config))
    if cross and not config.merged_attention:
        yield from inside("cross_attention_norm", norm_shapes(config))
        if norm_source:
            yield from inside("source_norm", norm_shapes(config))
        yield from inside("cross_attention", attention_shapes(config, cross=True))
    yield from inside("feed_forward_norm", norm_shapes(config))
    yield from inside("feed_forward", feed_forward_shapes(config))

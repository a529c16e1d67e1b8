"""What ENTP's chunks keep for their backward passes, from shapes alone (see models/kept.py).

Shape letters: B rows of a chunk, S tokens of its longest prefix, P prefixes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from models.kept import (
    Amount,
    Round,
    Segment,
    attention,
    block,
    feed_forward,
    feed_forward_gradients,
    final_norm,
    norm,
    residual,
    rotary,
)
from models.prefix_chunks import Chunk, plan_chunks

if TYPE_CHECKING:
    from models.config import ModelConfig
    from models.operations import Pass


@dataclass(frozen=True)
class _Sizes:
    """Of one chunk."""

    rows: int
    longest: int
    prefixes: int
    packed: int
    """(token, prefix) pairs of a row."""
    is_run: bool

    @property
    def pairs(self) -> int:
        return self.rows * self.packed


def kept(config: ModelConfig, rows: int, step: Pass, *, absorbs: bool) -> Iterator[Round]:
    """The chunks with the most pairs and with the longest prefix."""
    tokens, sampled = step.tokens, config.entp_sampled_prefixes
    is_sample = 0 < sampled < tokens
    chunks = plan_chunks(1, tokens, config.entp_chunk_pairs, sampled)
    calls, whole = rows * len(chunks), len(chunks) == 1
    if whole:
        chunks = plan_chunks(rows, tokens, config.entp_chunk_pairs, sampled)
        calls = len(chunks)

    def sizes(chunk: Chunk) -> _Sizes:
        count = chunk.stop - chunk.start
        packed = (chunk.start + 1 + chunk.stop) * count // 2
        longest = tokens if is_sample else chunk.stop
        # Where a sample falls is not known: no prefix is longer than the sequence.
        packed = count * tokens if is_sample else packed
        return _Sizes(chunk.last_row - chunk.first_row, longest, count, packed, not is_sample)

    described = [sizes(chunk) for chunk in chunks]
    fullest = max(described, key=lambda s: s.pairs)
    longest = max(described, key=lambda s: (s.rows * s.longest, s.pairs))
    for chunk in {fullest, longest}:
        found = _round(config, chunk, tokens, absorbs=absorbs, shares=not whole)
        yield replace(found, calls=calls)


def _round(
    config: ModelConfig, chunk: _Sizes, tokens: int, *, absorbs: bool, shares: bool
) -> Round:
    """One chunk; `shares`: its rows have others, with which it shares what `project` made."""
    causal, depth = config.entp_causal_layers, config.num_layers
    shared = chunk.rows * tokens
    lower = [block(config, f"blocks.{i}", shared) for i in range(causal)]
    middle = [_middle(config, f"blocks.{i}", chunk.pairs) for i in range(causal + 1, depth - 1)]
    ends = chunk.rows * chunk.prefixes
    return Round(
        segments=(
            *lower,
            _first(config, f"blocks.{causal}", chunk),
            *middle,
            _last(config, f"blocks.{depth - 1}", chunk, absorbs=absorbs),
            final_norm(config, ends),
        ),
        states=ends,
        scored=ends,
        beside=_projected(config, shared, shares=shares)
        + rotary(config, tokens)
        + rotary(config, chunk.packed),
    )


def _projected(config: ModelConfig, positions: int, *, shares: bool) -> Amount:
    """The first bidirectional layer's input, queries, keys and values; with several chunks their
    gradients in fp32 too, and where they are narrower a wide copy."""
    width, kv_width = config.num_heads * config.head_dim, config.kv_width()
    handed_on = positions * (config.d_model + width + 2 * kv_width)
    projected = positions * (width + 2 * kv_width) * (2 if config.qkv_norm else 1)
    found = residual(config, positions) + Amount(projected)
    return found + Amount(wide=handed_on) if shares else found


def _first(config: ModelConfig, module: str, chunk: _Sizes) -> Segment:
    """Attention shared by all prefixes, then the rest at every pair."""
    width, kv_width = config.num_heads * config.head_dim, config.kv_width()
    if chunk.is_run:
        squares = chunk.rows * config.num_heads * chunk.longest**2
        steps = chunk.prefixes * chunk.longest * chunk.rows * config.num_heads
        own = chunk.rows * chunk.longest * width
        read = Amount(2 * own + chunk.pairs * width, squares + steps + 2 * own)
        through = Amount(wide=3 * squares + 2 * steps + 3 * own)
    else:
        read = Amount(chunk.pairs * (2 * width + 2 * kv_width), chunk.pairs * config.num_heads)
        read += Amount(chunk.pairs * width)
        through = Amount()
    kept = read + _combined(config, chunk.pairs) + residual(config, chunk.pairs)
    gradients = feed_forward_gradients(config, chunk.pairs)
    working = max(gradients, through, key=lambda amount: amount.bytes(4))
    return Segment(
        module,
        kept=kept + feed_forward(config, chunk.pairs),
        entry=Amount(),
        working=working,
    )


def _combined(config: ModelConfig, positions: int) -> Amount:
    """What a norm of the attention result keeps."""
    if config.attention_output_norm in ("head", "model"):
        return Amount(positions * config.num_heads * config.head_dim, positions)
    return Amount(positions * config.d_model * (config.attention_output_norm == "output"))


def _middle(config: ModelConfig, module: str, pairs: int) -> Segment:
    """Every prefix's own attention: a result for each, and all of them in one."""
    plain = block(config, module, pairs)
    twice = Amount(pairs * config.num_heads * config.head_dim)
    return Segment(module, plain.kept + twice, plain.entry, plain.working)


def _last(config: ModelConfig, module: str, chunk: _Sizes, *, absorbs: bool) -> Segment:
    """Attention of each prefix's last token, and the rest for those alone."""
    ends, pairs = chunk.rows * chunk.prefixes, chunk.pairs
    width, d = config.num_heads * config.head_dim, config.d_model
    kept = Amount(2 * pairs * d) + norm(config, pairs)
    kept += Amount(ends * (2 * width + d) + ends * config.num_heads * chunk.longest)
    if absorbs:
        kept += Amount(2 * ends * config.num_heads * d)
        working = Amount(pairs * d * 2 + 4 * ends * config.num_heads * d)
    else:
        kept += attention(config, ends, pairs)
        working = Amount(pairs * (2 * config.kv_width() + 2 * d))
    kept += residual(config, ends)
    return Segment(
        module,
        kept=kept + feed_forward(config, ends),
        entry=Amount(pairs * d),
        working=working,
    )

"""What ENTP's chunks keep for their backward passes, or hold without, from shapes alone (see
models/kept.py).

Shape letters: B rows of a chunk, S tokens of its longest prefix, P prefixes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from models.kept import (
    Amount,
    Round,
    Segment,
    activating,
    attending,
    attention,
    block,
    feed_forward,
    feed_forward_gradients,
    final_norm,
    norm,
    plain,
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
    tokens = step.tokens
    sampled = config.entp_sampled_prefixes if step.training else 0
    is_sample = 0 < sampled < tokens
    chunks, calls = _chunks(config, rows, tokens, sampled)

    def sizes(chunk: Chunk) -> _Sizes:
        # Of the prefixes before the first that is scored none is run.
        start = max(chunk.start, 0 if is_sample else tokens - step.scored)
        count = max(1, chunk.stop - start)
        packed, longest = (start + 1 + chunk.stop) * count // 2, chunk.stop
        if is_sample:
            # Drawn evenly, number n ends at most at (n + 1)·tokens / sampled.
            ends = [-(-(n + 1) * tokens // sampled) for n in range(chunk.start, chunk.stop)]
            packed, longest = sum(ends), ends[-1]
        return _Sizes(chunk.last_row - chunk.first_row, longest, count, packed, not is_sample)

    described = [sizes(chunk) for chunk in chunks]
    fullest = max(described, key=lambda s: s.pairs)
    longest = max(described, key=lambda s: (s.rows * s.longest, s.pairs))
    parts = len({(chunk.start, chunk.stop) for chunk in chunks})
    for chunk in {fullest, longest}:
        yield replace(_round(config, chunk, step, parts, absorbs=absorbs), calls=calls)


def _chunks(config: ModelConfig, rows: int, tokens: int, sampled: int) -> tuple[list[Chunk], int]:
    """The chunks of a micro-batch, or where no two rows share one those of a row; and how many the
    micro-batch has."""
    limits = tokens, config.entp_chunk_pairs, sampled
    if rows > 1 and plan_chunks(2, *limits)[0].last_row == 1:
        of_row = plan_chunks(1, *limits)
        return of_row, rows * len(of_row)
    found = plan_chunks(rows, *limits)
    return found, len(found)


def _round(config: ModelConfig, chunk: _Sizes, step: Pass, parts: int, *, absorbs: bool) -> Round:
    """One chunk, whose rows have `parts` of them."""
    causal, depth, tokens = config.entp_causal_layers, config.num_layers, step.tokens
    shared = chunk.rows * tokens
    lower = [block(config, f"blocks.{i}", shared) for i in range(causal)]
    middle = [_middle(config, f"blocks.{i}", chunk.pairs) for i in range(causal + 1, depth - 1)]
    ends = chunk.rows * chunk.prefixes
    turns = rotary(config, tokens) + rotary(config, chunk.packed)
    beside = _projected(config, shared) + turns
    carried = turns
    if chunk.is_run:
        squares = shared * tokens * config.num_heads
        late = shared * step.scored * config.num_heads
        beside += _scanned(config, shared, squares, parts)
        carried += _shared(config, shared, late, parts)
        # The last chunk's backward pass goes on through the scores of all. A pass without one makes
        # them, and their logarithmic sums, weights at entry and shares, twice for a moment.
        name = f"blocks.{causal}.attention"
        made = Amount(wide=2 * squares + 2 * late)
        lower.append(plain(name, Amount(), Amount(wide=5 * squares), made))
    elif parts > 1:
        width, kv_width = config.num_heads * config.head_dim, config.kv_width()
        beside += Amount(wide=shared * (config.d_model + width + 2 * kv_width))
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
        beside=beside,
        carried=carried,
    )


def _projected(config: ModelConfig, positions: int) -> Amount:
    """The first bidirectional layer's input, normed input, queries, keys and values."""
    width, kv_width = config.num_heads * config.head_dim, config.kv_width()
    projected = positions * (width + 2 * kv_width) * (2 if config.qkv_norm else 1)
    return residual(config, positions) + Amount(projected)


def _scanned(config: ModelConfig, positions: int, squares: int, parts: int) -> Amount:
    """models/prefix_scan.py, of all chunks of some rows: queries scaled, keys and values of every
    head, input and values in fp32; of each pair of tokens the weight at entry and the share; what
    tokens read at entry; the gradients of what chunks share; and what was read before about √n of
    the chunks."""
    width, d = config.num_heads * config.head_dim, config.d_model
    copies = Amount(2 * positions * width, positions * (d + 2 * width))
    made = Amount(wide=2 * squares + positions * width)
    gradients = Amount(wide=positions * (d + 2 * width) + squares)
    return copies + made + gradients + Amount(wide=math.isqrt(parts) * positions * width)


def _shared(config: ModelConfig, positions: int, late: int, parts: int) -> Amount:
    """What there is of it where nothing is kept, `late` shares of pairs of tokens among it; and the
    layer's input, queries, keys and values."""
    width, d = config.num_heads * config.head_dim, config.d_model
    read = (1 + math.isqrt(parts)) * positions * width
    projected = Amount(positions * (d + width + 2 * config.kv_width()))
    return projected + Amount(wide=positions * (d + width) + late + read)


def _first(config: ModelConfig, module: str, chunk: _Sizes) -> Segment:
    """What was read at every pair, then the rest."""
    width, kv_width = config.num_heads * config.head_dim, config.kv_width()
    read = Amount(chunk.pairs * width)
    if not chunk.is_run:
        read += Amount(chunk.pairs * (width + 2 * kv_width), chunk.pairs * config.num_heads)
        read += Amount(unfused=chunk.pairs * width)
    kept = read + _combined(config, chunk.pairs) + residual(config, chunk.pairs)
    # The feed-forward's callers have the layer's input and what was read.
    there = Amount(chunk.pairs * (3 * config.d_model + width))
    return Segment(
        module,
        kept=kept + feed_forward(config, chunk.pairs),
        entry=Amount(),
        working=feed_forward_gradients(config, chunk.pairs),
        passing=there + activating(config, chunk.pairs),
    )


def _combined(config: ModelConfig, positions: int) -> Amount:
    """What a norm of the attention result keeps."""
    if config.attention_output_norm in ("head", "model"):
        return Amount(positions * config.num_heads * config.head_dim, positions)
    return Amount(positions * config.d_model * (config.attention_output_norm == "output"))


def _middle(config: ModelConfig, module: str, pairs: int) -> Segment:
    """Every prefix's own attention; elsewhere than on a CPU a result for each, and all in one."""
    whole = block(config, module, pairs)
    width = config.num_heads * config.head_dim
    twice = Amount(unfused=pairs * width)
    # Of the attention its input, queries, keys and result are there until the end.
    there = Amount(pairs * (4 * config.d_model + 2 * width + config.kv_width()))
    attended = Amount(2 * pairs * config.d_model) + attending(config, pairs, pairs) + twice
    passing = attended.most(there + activating(config, pairs))
    return Segment(module, whole.kept + twice, whole.entry, whole.working, passing)


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
    # Scores and their softmax; in and out of it vectors of the model's width, or keys and values.
    passing = Amount(2 * pairs * d + 2 * ends * config.num_heads * chunk.longest)
    passing += Amount(2 * ends * config.num_heads * d if absorbs else 3 * pairs * config.kv_width())
    return Segment(
        module,
        kept=kept + feed_forward(config, ends),
        entry=Amount(pairs * d),
        working=working,
        passing=passing,
    )

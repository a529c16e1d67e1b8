"""ENTP's bidirectional layers on packed prefixes, each with the savings that its place allows.

They are functions of a block and not modules: the parameters are those of a decoder's blocks.
Shape letters: B rows, S tokens, P prefixes, h heads, k head width, d model width.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from models.attention import Attention
from models.block import Block
from models.last_token_attention import last_token_attention
from models.prefix_attention import (
    Prefixes,
    at_pairs,
    full_attention,
    scaled_scores,
)
from models.prefix_scan import Run, Scan
from models.rotary import Rotary


class Projected(NamedTuple):
    """What the first bidirectional layer needs of each token, the same in every prefix."""

    hidden: Tensor
    """[B, S, d]: the layer's input."""
    queries: Tensor
    """[B, S, h, k]."""
    keys: Tensor
    """[B, S, kv heads, k]."""
    values: Tensor
    """[B, S, kv heads, k]."""

    def at_pairs(self, prefixes: Prefixes) -> tuple[Tensor, Tensor]:
        """Of the pairs of any prefixes the layer's input [pairs, B, d] and what attention read
        [pairs, B, h, k], each prefix attended to by itself."""
        tokens = (x[:, : prefixes.longest].transpose(0, 1) for x in self)
        hidden, queries, keys, values = (at_pairs(x, prefixes) for x in tokens)
        return hidden, full_attention(queries, keys, values, prefixes)


def project(block: Block, hidden: Tensor, rotary: Rotary | None) -> Projected:
    """`hidden` [B, S, d] and its queries, keys and values in `block`."""
    attention = block.attention
    normed = block.attention_norm(hidden)
    queries, keys = attention.queries(normed, rotary), attention.keys(normed, rotary)
    return Projected(hidden, queries, keys, attention.values(normed))


def scan(projected: Projected, first: int) -> Scan:
    """What all prefixes share whose shortest one ends at token `first`."""
    hidden, queries, keys, values = projected
    group = queries.shape[2] // keys.shape[2]
    keys, values = (x.repeat_interleave(group, dim=2) for x in (keys, values))
    return Scan(hidden, scaled_scores(queries, keys), values, first)


def first_layer(block: Block, source: Projected | Run, prefixes: Prefixes) -> Tensor:
    """Tokens → pairs [pairs, B, d]."""
    return enter(block, *source.at_pairs(prefixes))


def enter(block: Block, tokens: Tensor, mixed: Tensor) -> Tensor:
    """The first layer's rest: its input at every pair [pairs, B, d], and what attention read there
    [pairs, B, h, k], → [pairs, B, d]."""
    return _feed_forward(block, tokens + block.dropout(block.attention.combine(mixed)))


def middle_layer(block: Block, pairs: Tensor, rotary: Rotary | None, prefixes: Prefixes) -> Tensor:
    """[pairs, B, d] → [pairs, B, d]."""
    attention = block.attention
    normed = block.attention_norm(pairs)
    queries, keys = attention.queries(normed, rotary), attention.keys(normed, rotary)
    attended = full_attention(queries, keys, attention.values(normed), prefixes)
    return _feed_forward(block, pairs + block.dropout(attention.combine(attended)))


def last_layer(block: Block, pairs: Tensor, rotary: Rotary | None, prefixes: Prefixes) -> Tensor:
    """[pairs, B, d] → each prefix's last token [P, B, d]."""
    attention = block.attention
    normed = block.attention_norm(pairs)
    ends = prefixes.ends
    end_rotary = None if rotary is None else (rotary[0][ends], rotary[1][ends])
    queries = attention.queries(normed[ends], end_rotary) * attention.head_dim**-0.5
    if absorbs(attention, rotary):
        vectors, constants = attention.key(queries, "reverse")
        source = normed.unsqueeze(2)
        mixed = last_token_attention(vectors, constants, source, source, prefixes)
        attended = attention.value(mixed, "per_head")
    else:
        keys, values = attention.keys(normed, rotary), attention.values(normed)
        constants = queries.new_zeros(queries.shape[:-1])
        attended = last_token_attention(queries, constants, keys, values, prefixes)
    return _feed_forward(block, pairs[ends] + block.dropout(attention.combine(attended)))


def absorbs(attention: Attention, rotary: Rotary | None) -> bool:
    """Whether keys and values are plain linear maps with a head each, as absorption needs."""
    plain = not attention.qkv_norm and rotary is None
    return plain and attention.num_kv_heads == attention.num_heads


def _feed_forward(block: Block, hidden: Tensor) -> Tensor:
    return hidden + block.dropout(block.feed_forward(block.feed_forward_norm(hidden)))

"""One forward pass over one sequence as a table of matrix products; from shapes alone.

The rows are the same in training, in reading a prompt and in generating a token: a `Pass` says how
many positions are new, and how many earlier ones left their keys and values behind. 1 multiply-add
= 2 FLOPs; elementwise work (norms, softmax, activations, rotations) is not counted. Imports no
torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from models.config import ModelConfig


@dataclass(frozen=True)
class HiddenPairs:
    """(query, key) pairs that masks hide; of one sequence's attention, or added up over several.

    The table of operations is affine in these four.
    """

    own: float = 0.0
    """Among the tokens. A causal mask hides half, as every published formula has it (not
    S² − S(S+1)/2)."""
    skipped: int = 0
    """Of these, what no kernel computes: attention runs inside each document."""
    source_skipped: int = 0
    """Among a source's own positions; none of them is computed."""
    crossed: int = 0
    """Of a token and a source token in different documents: computed, and masked."""

    def __add__(self, other: HiddenPairs) -> HiddenPairs:
        return HiddenPairs(
            own=self.own + other.own,
            skipped=self.skipped + other.skipped,
            source_skipped=self.source_skipped + other.source_skipped,
            crossed=self.crossed + other.crossed,
        )


@dataclass(frozen=True)
class Pass:
    """The lengths of one forward pass over one sequence.

    Raises:
        ValueError: lengths that no sequence has.
    """

    tokens: int
    """New positions of the decoder, or of the only stack."""
    scored: int
    """How many of them, the last ones, have logits; ENTP runs prefixes for these alone."""
    source: int = 0
    """Positions of the encoder of an encoder-decoder."""
    prefix: int | None = None
    """Leading tokens that see each other in both directions; None where the batch has no prefix
    mask. A mask with a prefix of 0 hides what none hides, but is written out with documents."""
    documents: tuple[int, ...] = ()
    """Lengths of the documents that attention stays inside; () where it does not."""
    source_documents: tuple[int, ...] = ()
    """Lengths of the same documents' parts of the source, in the same order; 0 where one has none
    there (and in `documents` where it has none among the tokens)."""
    rows: int = 1
    """Sequences of the batch: how many decides where ENTP cuts the work into chunks, and of a chunk
    that has nothing to score a token is run."""
    training: bool = True
    """Forward for a backward pass. False: nothing is kept but caches."""
    cached: int = 0
    """Earlier positions of the decoder whose keys and values are kept."""
    is_source_cached: bool = False
    """The source was read before: the decoder's keys and values of it are kept."""
    hidden: HiddenPairs | None = None
    """What the masks hide; None: as `prefix` and the documents say."""

    def __post_init__(self) -> None:
        for field in ("tokens", "source", "cached"):
            if getattr(self, field) < 0:
                raise ValueError(f"{field}={getattr(self, field)}: negative; give at least 0")
        if not 0 <= self.scored <= self.tokens:
            raise ValueError(
                f"scored={self.scored}: not in 0 … {self.tokens} tokens; give fewer positions"
            )
        if self.prefix is not None and not 0 <= self.prefix <= self.tokens:
            raise ValueError(
                f"prefix={self.prefix}: not in 0 … {self.tokens} tokens; give a shorter one"
            )
        for field in ("documents", "source_documents"):
            if min(getattr(self, field), default=0) < 0:
                raise ValueError(
                    f"{field}={getattr(self, field)}: a negative length; give at least 0 for each"
                )
        has_documents = bool(self.documents or self.source_documents)
        if has_documents and sum(self.documents) != self.tokens:
            raise ValueError(
                f"documents={self.documents}: add up to {sum(self.documents)} of {self.tokens} "
                "tokens; give the lengths of all"
            )
        if has_documents and sum(self.source_documents) != self.source:
            raise ValueError(
                f"source_documents={self.source_documents}: add up to {sum(self.source_documents)} "
                f"of {self.source} source tokens; give the lengths of all"
            )
        if self.source and len(self.source_documents) != len(self.documents):
            raise ValueError(
                f"source_documents={self.source_documents}: not as many as documents="
                f"{self.documents}; give a length for each, 0 where there is none"
            )

    @property
    def context(self) -> int:
        """Positions that the last token sees, itself included."""
        return self.cached + self.tokens

    def hidden_pairs(self) -> float:
        """`HiddenPairs.own`; a generated token attends to all that is cached and hides nothing."""
        if self.hidden is not None:
            return self.hidden.own
        if not self.training and self.tokens == 1:
            return 0.0
        seen, left = 0, self.prefix or 0
        for length in self.documents or (self.tokens,):
            # The prefix is the sequence's; of a document it is what reaches into it.
            inside = min(length, left)
            left -= inside
            seen += length**2 + inside**2
        return self.tokens**2 - seen / 2

    def skipped_pairs(self) -> int:
        """`HiddenPairs.skipped`; none with a prefix mask, which is written out."""
        if self.hidden is not None:
            return self.hidden.skipped
        return 0 if self.prefix is not None else _across(self.documents, self.documents)

    def source_skipped_pairs(self) -> int:
        """`HiddenPairs.source_skipped`."""
        if self.hidden is not None:
            return self.hidden.source_skipped
        return _across(self.source_documents, self.source_documents)

    def crossed_pairs(self) -> int:
        """`HiddenPairs.crossed`."""
        if self.hidden is not None:
            return self.hidden.crossed
        return _across(self.documents, self.source_documents)


def _across(first: tuple[int, ...], second: tuple[int, ...]) -> int:
    """Pairs of positions in different documents."""
    inside = sum(a * b for a, b in zip(first, second, strict=True))
    return sum(first) * sum(second) - inside


@dataclass(frozen=True)
class Operation:
    """Matrix products of one kind in one sequence's forward pass."""

    name: str
    forward: int
    """FLOPs, with attention in full."""
    masked: int = 0
    """Of these, attention that its mask hides: `model_causal` leaves it out."""
    skipped: int = 0
    """Of the masked, what no kernel computes: `hardware` leaves it out."""
    recomputed: bool = True
    """Done again in the backward pass under activation checkpointing."""


def once(name: str, forward: int) -> Operation:
    """An operation whose product no backward pass asks for again."""
    return Operation(name, forward, recomputed=False)


def attention_width(config: ModelConfig) -> int:
    """Width of all heads together."""
    return config.num_heads * config.head_dim


def projections(config: ModelConfig, queries: int, keys: int, *, cross: bool = False) -> int:
    """FLOPs of Q on `queries` positions, K and V on `keys` positions."""
    width, kv_width = attention_width(config), config.kv_width(cross=cross)
    return 2 * config.d_model * (queries * width + 2 * keys * kv_width)


def output_projection(config: ModelConfig, positions: int) -> int:
    """FLOPs of bringing the heads back to d_model."""
    return 2 * positions * attention_width(config) * config.d_model


def attention(
    config: ModelConfig, name: str, pairs: int, hidden_pairs: float = 0.0, skipped_pairs: int = 0
) -> Operation:
    """Scores and weighted values of `pairs` (query, key) pairs, `hidden_pairs` of them masked, and
    of these `skipped_pairs` not computed."""
    each = 4 * attention_width(config)
    masked = int(each * hidden_pairs)
    return Operation(name, each * pairs, masked=masked, skipped=each * skipped_pairs)


def feed_forward(config: ModelConfig, positions: int) -> Iterator[Operation]:
    """Up (and gate), then down. Recomputation stops before down: nobody keeps its result, unless
    dropout after it has a mask to make again."""
    matrix = 2 * positions * config.d_model * config.d_ffn
    yield Operation("feed-forward in", matrix * (2 if config.feed_forward == "swiglu" else 1))
    yield Operation("feed-forward out", matrix, recomputed=config.dropout > 0)


def self_attention(
    config: ModelConfig,
    tokens: int,
    *,
    cached: int = 0,
    hidden_pairs: float = 0.0,
    skipped_pairs: int = 0,
) -> Iterator[Operation]:
    """Of `tokens` positions on themselves and on `cached` earlier ones."""
    pairs = tokens * (cached + tokens)
    yield Operation("self-attention projections", projections(config, tokens, tokens))
    yield attention(config, "self-attention", pairs, hidden_pairs, skipped_pairs)
    yield Operation("self-attention output", output_projection(config, tokens))


def cross_attention(
    config: ModelConfig,
    tokens: int,
    source: int,
    *,
    new_source: int,
    hidden_pairs: float = 0.0,
    skipped_pairs: int = 0,
) -> Iterator[Operation]:
    """Of `tokens` positions on `source` ones, of which `new_source` have no keys and values yet."""
    inward = projections(config, tokens, new_source, cross=True)
    yield Operation("cross-attention projections", inward)
    yield attention(config, "cross-attention", tokens * source, hidden_pairs, skipped_pairs)
    yield Operation("cross-attention output", output_projection(config, tokens))


def merged_attention(
    config: ModelConfig,
    tokens: int,
    source: int,
    *,
    new_source: int,
    cached: int = 0,
    hidden_pairs: float = 0.0,
) -> Iterator[Operation]:
    """Of `tokens` positions on `source` ones, `cached` earlier ones and themselves together;
    `new_source` of the source have no keys and values yet."""
    pairs = tokens * (source + cached + tokens)
    inward = projections(config, tokens, tokens + new_source)
    yield Operation("merged attention projections", inward)
    yield attention(config, "merged attention", pairs, hidden_pairs)
    yield Operation("merged attention output", output_projection(config, tokens))

"""What a forward pass keeps for its backward pass, or holds without one, from shapes alone.

The tables are those of the modules in models/block.py, attention.py and layers.py, tensor by
tensor: what autograd or a function of ours saves, each storage once; and where nothing is saved,
what the names of a call and of its callers still hold at its fullest moment. They hold for
attention kernels that keep no scores (a CPU's and a GPU's flash attention). Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from models.config import ModelConfig


@dataclass(frozen=True)
class Amount:
    """Elements of tensors."""

    numbers: int = 0
    """In the format that the model computes in."""
    wide: int = 0
    """In fp32 whatever that is."""
    unfused: int = 0
    """In the format that the model computes in, where a function of ours that makes them again is
    not used: it is for fp32 on a CPU."""

    def __add__(self, other: Amount) -> Amount:
        return Amount(
            self.numbers + other.numbers, self.wide + other.wide, self.unfused + other.unfused
        )

    def most(self, other: Amount) -> Amount:
        """Of each kind of tensors the larger amount."""
        return Amount(
            max(self.numbers, other.numbers),
            max(self.wide, other.wide),
            max(self.unfused, other.unfused),
        )

    def bytes(self, width: int, *, on_cpu: bool) -> int:
        """Bytes where the model computes in numbers of `width` bytes."""
        fused = on_cpu and width == 4
        return (self.numbers + (0 if fused else self.unfused)) * width + self.wide * 4


@dataclass(frozen=True)
class Segment:
    """A part of the forward pass that is back-propagated as one, such as a block."""

    module: str
    """The module it runs, by its name in the model."""
    kept: Amount
    """What it leaves for its backward pass, input included."""
    entry: Amount
    """Its input, which is all that stays where it is computed again."""
    working: Amount
    """What its backward pass holds beside `kept` at its fullest moment."""
    passing: Amount
    """What its forward pass holds at its fullest moment where nothing is kept, input included."""


@dataclass(frozen=True)
class Round:
    """What one `backward` call of the trainer goes through, in forward order; or, of a pass that is
    not for training, what an evaluation computes at once."""

    segments: tuple[Segment, ...]
    states: int
    """Hidden states that the head is given, scored or not."""
    scored: int
    """Of these, with a loss."""
    beside: Amount = Amount()
    """Held from the first segment to the last."""
    carried: Amount = Amount()
    """The same where nothing is kept."""
    calls: int = 1
    """Backward calls of a micro-batch, of which this is the largest."""
    after_head: Amount = Amount()
    """What is made between the head and the backward pass, at its fullest moment."""


def norm(config: ModelConfig, positions: int) -> Amount:
    """Of one norm over d_model beside its input: one or two numbers a position."""
    return Amount(wide=positions * (2 if config.norm == "layernorm" else 1))


def attention(config: ModelConfig, queries: int, keys: int, *, cross: bool = False) -> Amount:
    """Of one attention of `queries` positions on `keys` positions, its normed input excepted.

    Q, K and V (each twice where they are normalised: before, and normalised and turned), what was
    read, and a number a head for the softmax and for each norm.
    """
    width, kv_width = config.num_heads * config.head_dim, config.kv_width(cross=cross)
    heads, kv_heads = config.num_heads, config.num_kv_heads
    if cross:
        heads, kv_heads = config.cross_heads, config.cross_kv_heads
    projected = queries * width + 2 * keys * kv_width
    found = Amount(projected + queries * width, queries * heads)
    if config.qkv_norm:
        found += Amount(projected, queries * heads + 2 * keys * kv_heads)
    if config.attention_output_norm == "head":
        found += Amount(queries * width, queries * heads)
    elif config.attention_output_norm == "model":
        found += Amount(queries * width, queries)
    elif config.attention_output_norm == "output":
        found += Amount(queries * config.d_model, queries)
    return found


def feed_forward(config: ModelConfig, positions: int) -> Amount:
    """Of one feed-forward, its input excepted: gate and up, or GELU's argument and result."""
    inner = positions * config.d_ffn
    return Amount(2 * inner) if config.feed_forward == "swiglu" else Amount(inner, unfused=inner)


def residual(config: ModelConfig, positions: int) -> Amount:
    """A branch from the residual stream: the stream's state, what its norm makes of it, and the
    mask of dropout where there is one."""
    dropped = positions * config.d_model if config.dropout else 0
    return Amount(2 * positions * config.d_model + dropped) + norm(config, positions)


def feed_forward_gradients(config: ModelConfig, positions: int) -> Amount:
    """What the feed-forward's backward pass holds at its fullest: the gradient of its result, and
    of SwiGLU the gradient of the product, the product and silu(gate), of GELU the gradient of its
    result (that of its argument comes when the result itself is gone)."""
    parts = 3 if config.feed_forward == "swiglu" else 1
    weight = config.d_model * config.d_ffn
    return Amount(positions * (parts * config.d_ffn + config.d_model) + weight)


def block(
    config: ModelConfig,
    module: str,
    positions: int,
    *,
    source: int = 0,
    norm_source: bool = False,
) -> Segment:
    """A block over `positions`, which reads `source` positions where there are any.

    The source itself is kept once for all blocks that read it, and is not counted here.
    """
    kept = residual(config, positions)
    if source and config.merged_attention:
        kept += attention(config, positions, source + positions)
    else:
        kept += attention(config, positions, positions)
    entry = Amount(positions * config.d_model)
    if source and not config.merged_attention:
        kept += residual(config, positions) + attention(config, positions, source, cross=True)
        if norm_source:
            kept += Amount(source * config.d_model) + norm(config, source)
    kept += residual(config, positions)
    return Segment(
        module,
        kept=kept + feed_forward(config, positions),
        entry=entry,
        working=feed_forward_gradients(config, positions)
        + Amount(source * config.d_model),  # the source's gradient, added up over blocks
        passing=_passing(config, positions, source, norm_source=norm_source),
    )


def _passing(
    config: ModelConfig, positions: int, source: int, *, norm_source: bool = False
) -> Amount:
    """Of a block that keeps nothing: its fullest moment is in an attention or the feed-forward.

    While the feed-forward runs there are the block's input, the stream's state, what its norm makes
    of it, and of an attention before it what its caller still has a name for.
    """
    d = positions * config.d_model
    if source and config.merged_attention:
        inside = attending(config, positions, source + positions, more=config.kv_width())
        return (Amount(2 * d) + inside).most(Amount(5 * d) + activating(config, positions))
    before = 4 if source and config.cross_attention_first else 2
    found = Amount(before * d) + attending(config, positions, positions)
    if not source:
        return found.most(Amount(3 * d) + activating(config, positions))
    crossed = Amount(3 * d) + attending(config, positions, source, cross=True)
    if norm_source:
        crossed += Amount(source * config.d_model)
    return found.most(crossed).most(Amount(4 * d) + activating(config, positions))


def attending(
    config: ModelConfig, queries: int, keys: int, *, cross: bool = False, more: int = 0
) -> Amount:
    """Of one attention that keeps nothing, its normed input excepted: Q, K and V, what was read
    (twice where that is normed), and the result; or K, V and, with `more` of them for each key, the
    parts that the last of them is joined of."""
    width, kv_width = config.num_heads * config.head_dim, config.kv_width(cross=cross)
    heads = config.cross_heads if cross else config.num_heads
    projected = Amount(queries * width + 2 * keys * kv_width)
    normed = config.attention_output_norm in ("head", "model")
    result = queries * (config.d_model * (1 + (config.attention_output_norm == "output")))
    read = Amount(queries * width + max(queries * width * normed, result), queries * heads)
    return projected + read.most(Amount(keys * more))


def activating(config: ModelConfig, positions: int) -> Amount:
    """Of one feed-forward that keeps nothing, its input excepted: up, its activation or gate and
    product, and the result."""
    inner = 3 if config.feed_forward == "swiglu" else 2
    return Amount(positions * (inner * config.d_ffn + config.d_model))


def plain(
    module: str, kept: Amount, working: Amount = Amount(), passing: Amount | None = None
) -> Segment:
    """A segment that is never computed again, and of which a pass without gradients holds as much
    as the backward pass unless `passing` says otherwise: an input and a result."""
    passing = kept + working if passing is None else passing
    return Segment(module, kept=kept, entry=kept, working=working, passing=passing)


def final_norm(config: ModelConfig, positions: int) -> Segment:
    """The last norm, with its input."""
    kept = Amount(positions * config.d_model) + norm(config, positions)
    return plain("final_norm", kept, Amount(positions * config.d_model))


def rotary(config: ModelConfig, positions: int, head_dim: int | None = None) -> Amount:
    """Cosines and sines of `positions`, where there are any."""
    if config.positions != "rotary":
        return Amount()
    return Amount(wide=positions * (head_dim or config.head_dim))

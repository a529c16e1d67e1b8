"""What a model is: one frozen description, refused where it is impossible.

The named shapes that `named` looks up are in `models.shapes`. This module does not import torch:
help pages and planning need shapes only.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from models.config_checks import check
from models.registry import architecture
from models.shapes import SIZES, sizes_of


@dataclass(frozen=True)
class ModelConfig:
    """One model. Its choices default to DecLLM's; `named` gives every architecture its own.

    What arXiv 2510.26622 leaves open carries [NF] ("not found") and the reason of our default.

    Raises:
        ValueError: for an impossible value, naming field, value and remedy.
    """

    arch: str
    """Architecture: a name of `models/registry.py`."""
    vocab_size: int
    """Rows of the tied embedding."""
    d_model: int
    """Width of the residual stream."""
    d_ffn: int
    """Width inside the feed-forward."""
    num_heads: int
    """Query heads of self-attention."""
    num_kv_heads: int
    """Key and value heads; fewer than num_heads is grouped-query attention."""
    head_dim: int
    """Width of one head."""
    num_layers: int
    """Blocks of the decoder, or of the only stack."""
    num_encoder_layers: int = 0
    """Blocks of the encoder, 0 where there is none."""
    max_seq_len: int = 2048
    """Longest input of a model with learned positions; rotary positions have no end."""

    positions: str = "rotary"
    """"rotary" or "learned" (absolute, added to the embedding)."""
    rope_base: float = 10_000.0
    """[NF] Rotary base: the value of RoFormer and Llama, right for 2048 positions."""
    norm: str = "rmsnorm"
    """"rmsnorm" or "layernorm", in pre-norm position."""
    norm_eps: float = 1e-6
    """[NF] Added to the mean square under the root: T5X's value."""
    bias: bool = False
    """Biases in linear layers and in LayerNorm."""
    feed_forward: str = "swiglu"
    """"swiglu" (three matrices) or "gelu" (two, the tanh form as in GPT-2)."""
    qkv_norm: bool = True
    """Parameter-free RMSNorm over each head of Q, K and V. Whether rotation comes before or after
    is [NF] and changes nothing: a rotation keeps the norm. We normalise first."""
    attention_output_norm: str = "none"
    """[NF] Where RedLLM's parameter-free norm of the attention result acts: "head" (each head,
    before the output projection: the same operation as on Q, K and V, so logits and values stay
    on one scale), "model" (the heads together), "output" (after the output projection, over
    d_model: the branch joins the residual stream with unit scale), or "none"."""
    scale_embedding: bool = True
    """[NF] Multiply the embedded input by sqrt(d_model): with tied embeddings of variance
    1/d_model both the residual stream and the first logits have unit variance (as T5 and Gemma)."""
    initializer: str = "fan_in"
    """[NF] "fan_in": N(0, 1/fan_in), T5X's; "normal": N(0, init_std), GPT-2's. Adafactor's step is
    relative to RMS(parameter), so models compared under it should start on the same scale."""
    init_std: float = 0.02
    """Standard deviation of the "normal" initializer."""
    scale_residual_init: bool = False
    """Divide the first values of projections into the residual stream by sqrt(2·layers) (GPT-2)."""
    dropout: float = 0.0
    """[NF] Probability of dropping, on the embedded input and on every residual branch. ENTP's
    prefixes share their embedded input, so there only on the branches."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass instead of keeping its activations."""

    entp_chunk_pairs: int = 960
    """ENTP: most (token, prefix) pairs of one back-propagated chunk; bounds the memory. Fewer make
    matrix products too small to be fast, more only cost memory."""
    entp_causal_layers: int = 0
    """ENTP: lower layers that are causal, and so the same in every prefix; 0 is the paper's model,
    one less than num_layers a decoder. Each lets a prefix's layers be one fewer."""
    entp_sampled_prefixes: int = 0
    """ENTP: prefixes of a sequence that a training loss is estimated from, spread evenly from a
    random start and weighted so that the estimate is unbiased; 0: all, as in every evaluation."""

    restart_positions: bool = False
    """Count positions, rotary and learned, from 0 in each document of a batch with document_ids,
    as if it stood alone; False counts through the row. A RedLLM's run on from the document's own
    encoder part."""

    num_cross_heads: int = 0
    """Heads of cross-attention, of width num_heads·head_dim / num_cross_heads; 0: as num_heads."""
    num_cross_kv_heads: int = 0
    """Key and value heads of cross-attention; 0: as many queries share one as in self-attention,
    so that both cache equally wide keys."""
    cross_attention_first: bool = False
    """Cross-attention before self-attention (ARED's "ALT" order, found worse)."""
    merged_attention: bool = False
    """RedLLM: one attention of each decoder block over encoder output and decoder states together
    (T5Gemma 2, arXiv 2512.14856), in the place of two: a third fewer decoder parameters but for
    the feed-forward. Every key is rotated: positions stay continuous."""
    encoder_final_norm: bool = True
    """[NF] RedLLM: norm of the encoder's output, with gain. Pre-norm stacks end in one (T5), and
    cross-attention reads a stream whose scale would grow with the depth without it."""

    positional_subtraction: bool = False
    """ARED and DecLLM: take the next position's embedding off the final hidden state."""
    positional_subtraction_norm: bool = False
    """Another norm after the subtraction ("YES_LN", found worse than none, "YES_NO_LN")."""
    bridge_norm: bool = False
    """ARED: a norm before the bridge from encoder to decoder (found detrimental)."""
    bridge_next_position: bool = False
    """ARED: add the next position's embedding after the bridge (found detrimental)."""
    embedding_loss: str = "none"
    """ARED: auxiliary loss between encoder output and running mean of embeddings."""
    embedding_loss_coefficient: float = 1.0
    """ARED: weight of the embedding loss (8 in the best published run)."""
    embedding_loss_affine: bool = True
    """ARED: gain and bias in the norms of the embedding loss, as published. Both can shrink to
    zero and the loss with them; False gives norms that cannot."""
    embedding_loss_detach: str = "encoder"
    """ARED: the side that the embedding loss does not train: "encoder" (its output, as published),
    "embedding" or "none"."""
    embedding_encoder_norm: bool = True
    """ARED: norm the encoder output inside the embedding loss."""
    embedding_mean_norm: str = "before"
    """ARED: norm the embeddings "before" they are averaged (as published), their mean "after", or
    "none"."""

    def __post_init__(self) -> None:
        check(self)

    @property
    def cross_heads(self) -> int:
        """Heads of cross-attention."""
        return self.num_cross_heads or self.num_heads

    @property
    def cross_kv_heads(self) -> int:
        """Key and value heads of cross-attention."""
        group = self.num_heads // self.num_kv_heads
        return self.num_cross_kv_heads or max(1, self.cross_heads // group)

    @property
    def cross_head_dim(self) -> int:
        """Width of one head of cross-attention."""
        return self.num_heads * self.head_dim // self.cross_heads

    def kv_width(self, *, cross: bool = False) -> int:
        """Width of all keys of one position together, in self- or in cross-attention."""
        if cross:
            return self.cross_kv_heads * self.cross_head_dim
        return self.num_kv_heads * self.head_dim

    @property
    def position_rows(self) -> int:
        """Rows of the table of learned positions; 0 where there is none."""
        if self.positions != "learned":
            return 0
        return self.max_seq_len + (self.positional_subtraction or self.bridge_next_position)


def named(arch: str, size: str, vocab_size: int, **overrides: Any) -> ModelConfig:
    """The model of architecture `arch` and named `size`; `overrides` are fields of ModelConfig.

    Raises:
        ValueError: unknown arch, size or field, or an impossible value; says what there is.
    """
    described = architecture(arch)
    if size not in SIZES or not SIZES[size].fits(arch):
        choices = ", ".join(sizes_of(arch))
        raise ValueError(f"size={size!r}: not a size of {arch}; give one of: {choices}")
    fields = {field.name for field in dataclasses.fields(ModelConfig)} - {"arch", "vocab_size"}
    for key, value in overrides.items():
        if key not in fields:
            raise ValueError(
                f"{key}={value!r}: not a model field; give one of: {', '.join(fields)}"
            )
    shape = SIZES[size]
    num_heads = overrides.get("num_heads", shape.num_heads)
    values: dict[str, Any] = {
        "d_model": shape.d_model,
        "d_ffn": 4 * shape.d_model,
        "num_heads": shape.num_heads,
        "num_kv_heads": num_heads,
        "head_dim": shape.head_dim,
        "num_layers": shape.num_layers,
    }
    values |= described.derived(shape, num_heads)
    values |= described.style
    values |= dict(shape.style)
    return ModelConfig(arch, vocab_size, **(values | overrides))

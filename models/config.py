"""What a model is: one frozen description, and the named shapes.

The paper shapes (150m … 8b) are table 2(a) of arXiv 2510.26622; the ladder below them keeps their
pattern (d_ffn = 4·d_model with SwiGLU's three matrices, decoder layers growing with the width,
RedLLM's depths chosen for about the same parameters). Published shapes of the other papers have
names of their own.

This module does not import torch: help pages and planning need shapes only.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

# Choices that arXiv 2510.26622 leaves open carry [NF] ("not found") and the reason of our default.
_CHOICES: dict[str, tuple[str, ...]] = {
    "positions": ("rotary", "learned"),
    "norm": ("rmsnorm", "layernorm"),
    "feed_forward": ("swiglu", "gelu"),
    "attention_output_norm": ("none", "head", "model"),
    "initializer": ("fan_in", "normal"),
    "embedding_loss": ("none", "mse", "cosine", "log_cosine"),
}


@dataclass(frozen=True)
class ModelConfig:
    """One model. Its choices default to DecLLM's; `named` gives every architecture its own.

    Raises:
        ValueError: for an impossible value, naming field, value and remedy.
    """

    arch: str
    """Architecture: a key of `STYLES`."""
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
    on one scale), "model" (the heads together), or "none"."""
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

    entp_chunk_pairs: int = 16_384
    """ENTP: most (token, prefix) pairs of one back-propagated chunk; bounds the memory."""

    num_cross_heads: int = 0
    """Heads of cross-attention, of width num_heads·head_dim / num_cross_heads; 0: as num_heads."""
    positional_subtraction: bool = False
    """ARED: take the next position's embedding off the final hidden state."""
    embedding_loss: str = "none"
    """ARED: auxiliary loss between encoder output and running mean of embeddings."""
    embedding_loss_coefficient: float = 1.0
    """ARED: weight of the embedding loss (8 in the best published run)."""
    embedding_loss_affine: bool = True
    """ARED: gain and bias in the two norms of the embedding loss, as published. Both can shrink
    to zero and the loss with them; False gives norms that cannot."""

    def __post_init__(self) -> None:
        if self.arch not in STYLES:
            raise ValueError(f"arch={self.arch!r}: not known; give one of: {', '.join(STYLES)}")
        for field, choices in _CHOICES.items():
            value = getattr(self, field)
            if value not in choices:
                raise ValueError(f"{field}={value!r}: not known; give one of: {', '.join(choices)}")
        for field in ("vocab_size", "d_model", "d_ffn", "num_heads", "num_kv_heads", "head_dim"):
            self._require(field, 1)
        for field in ("num_layers", "max_seq_len", "entp_chunk_pairs"):
            self._require(field, 1)
        self._require("num_cross_heads", 0)
        self._require("num_encoder_layers", int(self.arch in ("redllm", "ared")))
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads={self.num_kv_heads}: does not divide num_heads={self.num_heads}; "
                "give a divisor"
            )
        if self.positions == "rotary" and self.head_dim % 2:
            raise ValueError(
                f"head_dim={self.head_dim}: rotary positions turn pairs; give an even number"
            )
        if self.num_heads * self.head_dim % self.cross_heads:
            raise ValueError(
                f"num_cross_heads={self.num_cross_heads}: does not divide num_heads·head_dim="
                f"{self.num_heads * self.head_dim}; give a divisor"
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout={self.dropout}: not a probability; give 0 ≤ dropout < 1")

    def _require(self, field: str, minimum: int) -> None:
        if getattr(self, field) < minimum:
            raise ValueError(f"{field}={getattr(self, field)}: too small; give at least {minimum}")

    @property
    def cross_heads(self) -> int:
        """Heads of cross-attention."""
        return self.num_cross_heads or self.num_heads


# What each architecture's own paper or code prescribes, over the defaults above.
_GPT2: dict[str, Any] = {
    "positions": "learned",
    "norm": "layernorm",
    "norm_eps": 1e-5,
    "bias": True,
    "feed_forward": "gelu",
    "qkv_norm": False,
    "scale_residual_init": True,
}
STYLES: dict[str, dict[str, Any]] = {
    "decllm": {},
    "redllm": {"attention_output_norm": "head"},
    "entp": _GPT2,
    "ared": {
        **_GPT2,
        "bias": False,
        # Positional subtraction works on the embedding's own scale.
        "scale_embedding": False,
        "positional_subtraction": True,
        "embedding_loss": "mse",
        "embedding_loss_coefficient": 8.0,
    },
}


@dataclass(frozen=True)
class Shape:
    """A named size: what differs between sizes of one architecture."""

    d_model: int
    num_heads: int
    head_dim: int
    num_layers: int
    """Blocks of a single stack."""
    num_paired_layers: int
    """Blocks of the encoder, and of the decoder, of a two-stack model with about as many
    parameters (RedLLM has 36·d² for a pair against 16·d² a block, ARED 28·d² against 12·d²)."""
    archs: tuple[str, ...] = ("decllm", "redllm", "entp", "ared")
    """Architectures that the name exists for."""
    style: tuple[tuple[str, Any], ...] = ()
    """Fields of ModelConfig that the publication fixes."""


_AS_PUBLISHED = (("initializer", "normal"), ("scale_embedding", False))
_ENTP: dict[str, Any] = {"archs": ("entp", "decllm"), "style": (*_GPT2.items(), *_AS_PUBLISHED)}
_ARED_BASELINE: dict[str, Any] = {
    "archs": ("decllm",),
    "style": (*(_GPT2 | {"bias": False}).items(), *_AS_PUBLISHED),
}

SIZES: dict[str, Shape] = {
    "nano": Shape(32, 2, 16, 2, 1),
    "micro": Shape(64, 4, 16, 2, 1),
    "mini": Shape(96, 6, 16, 2, 1),
    "tiny": Shape(128, 4, 32, 4, 2),
    "small": Shape(256, 8, 32, 4, 2),
    "base": Shape(384, 6, 64, 7, 3),
    "medium": Shape(512, 8, 64, 9, 4),
    "100m": Shape(768, 12, 64, 11, 5),
    # arXiv 2510.26622, table 2(a)
    "150m": Shape(1024, 8, 128, 8, 3),
    "1b": Shape(2048, 16, 128, 16, 7),
    "2b": Shape(2560, 20, 128, 20, 9),
    "4b": Shape(3072, 24, 128, 24, 10),
    "8b": Shape(4096, 32, 128, 32, 14),
    # The ENTP authors' ladder; as DecLLM the same weights under a causal mask, their baseline.
    "entp-xsmall": Shape(128, 2, 64, 2, 1, **_ENTP),
    "entp-small": Shape(192, 3, 64, 3, 1, **_ENTP),
    "entp-medium": Shape(384, 6, 64, 6, 3, **_ENTP),
    "entp-large": Shape(768, 12, 64, 12, 6, **_ENTP),
    "entp-xlarge": Shape(1024, 16, 64, 16, 8, **_ENTP),
    # The published auto-regressive encoder-decoder and its decoder-only baselines (context 200).
    "ared-15m": Shape(150, 5, 30, 13, 13, archs=("ared",), style=_AS_PUBLISHED),
    "ared-baseline": Shape(160, 10, 16, 26, 13, **_ARED_BASELINE),
    "ared-baseline-small": Shape(156, 12, 13, 26, 13, **_ARED_BASELINE),
}


def named(arch: str, size: str, vocab_size: int, **overrides: Any) -> ModelConfig:
    """The model of architecture `arch` and named `size`; `overrides` are fields of ModelConfig.

    Raises:
        ValueError: unknown arch, size or field, or an impossible value; says what there is.
    """
    if arch not in STYLES:
        raise ValueError(f"arch={arch!r}: not known; give one of: {', '.join(STYLES)}")
    if size not in SIZES or arch not in SIZES[size].archs:
        choices = ", ".join(name for name, shape in SIZES.items() if arch in shape.archs)
        raise ValueError(f"size={size!r}: not a size of {arch}; give one of: {choices}")
    fields = {field.name for field in dataclasses.fields(ModelConfig)} - {"arch", "vocab_size"}
    for key, value in overrides.items():
        if key not in fields:
            raise ValueError(
                f"{key}={value!r}: not a model field; give one of: {', '.join(fields)}"
            )
    shape = SIZES[size]
    values: dict[str, Any] = {
        "d_model": shape.d_model,
        "d_ffn": 4 * shape.d_model,
        "num_heads": shape.num_heads,
        "num_kv_heads": overrides.get("num_heads", shape.num_heads),
        "head_dim": shape.head_dim,
        "num_layers": shape.num_layers,
    }
    if arch in ("redllm", "ared"):
        values["num_layers"] = values["num_encoder_layers"] = shape.num_paired_layers
    if arch == "ared":
        values["num_cross_heads"] = 2 * overrides.get("num_heads", shape.num_heads)
    values |= STYLES[arch]
    values |= dict(shape.style)
    return ModelConfig(arch, vocab_size, **(values | overrides))

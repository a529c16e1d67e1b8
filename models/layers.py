"""The parts that architectures are composed of: norms, positions, attention, feed-forward, blocks.

Shape letters in comments: B batch, S positions, h heads, k head width, d model width.
Every parameter is used inside the forward of the module that owns it, so that ZeRO-3, which gathers
a module's own parameters around its forward, can run any of this.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.activations import gelu, swiglu
from models.config import ModelConfig
from models.losses import LossTerms, linear_cross_entropy, linear_token_nll

Rotary = tuple[Tensor, Tensor]
"""Cosines and sines, each [B or 1, S, 1, k/2]."""


def rms_normalise(hidden: Tensor, eps: float) -> Tensor:
    """Parameter-free RMSNorm over the last dimension."""
    return F.rms_norm(hidden, (hidden.shape[-1],), eps=eps)


def make_norm(config: ModelConfig) -> nn.Module:
    """The pre-norm of a block: RMSNorm or LayerNorm over d_model, with gain."""
    if config.norm == "rmsnorm":
        return nn.RMSNorm(config.d_model, eps=config.norm_eps)
    return nn.LayerNorm(config.d_model, eps=config.norm_eps, bias=config.bias)


def rotary_tables(positions: Tensor, config: ModelConfig, dtype: torch.dtype) -> Rotary:
    """Rotary angles' cosines and sines for `positions` ([S] or [B, S]), at least in fp32."""
    dtype = torch.float64 if dtype == torch.float64 else torch.float32
    half = config.head_dim // 2
    exponents = torch.arange(half, device=positions.device, dtype=dtype) / half
    angles = positions.to(dtype).unsqueeze(-1) * config.rope_base**-exponents
    angles = angles.reshape(-1, positions.shape[-1], 1, half)
    return angles.cos(), angles.sin()


class _Rotate(torch.autograd.Function):
    """Turns the pair (x[i], x[i + k/2]) by its position's angle, writing each half once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _rotated(grad, cos, -sin), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.to(cos.dtype).chunk(2, dim=-1)
    result = torch.empty(x.shape, dtype=cos.dtype, device=x.device)
    out_first, out_second = result.chunk(2, dim=-1)
    torch.mul(first, cos, out=out_first).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out_second).addcmul_(first, sin)
    return result.to(x.dtype)


def rotate(x: Tensor, rotary: Rotary | None) -> Tensor:
    """`x` [B, S, h, k] turned by its positions; unchanged where there is no rotary."""
    return x if rotary is None else _Rotate.apply(x, *rotary)


def initial_std(fan_in: int, config: ModelConfig) -> float:
    """Standard deviation of a matrix's first values."""
    return fan_in**-0.5 if config.initializer == "fan_in" else config.init_std


class Linear(nn.Linear):
    """A linear layer that draws its own first values.

    Every parameter is initialised in its own module's constructor: DeepSpeed's `zero.Init`
    partitions a module's parameters as soon as that constructor is over.
    """

    def __init__(
        self,
        fan_in: int,
        fan_out: int,
        config: ModelConfig,
        *,
        into_residual: bool = False,
        bias: bool | None = None,
    ) -> None:
        self.std = initial_std(fan_in, config)
        if into_residual and config.scale_residual_init:
            self.std /= math.sqrt(2 * max(config.num_layers, config.num_encoder_layers))
        super().__init__(fan_in, fan_out, bias=config.bias if bias is None else bias)

    def reset_parameters(self) -> None:
        """Weight from N(0, std²), bias zero."""
        nn.init.normal_(self.weight, std=self.std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class HeadLinear(Linear):
    """A projection to heads, which can also be applied per head and in reverse.

    The two other modes let attention absorb it (ENTP's last layer); they live here, because a
    weight may be touched only inside the forward of its own module.
    """

    def __init__(self, num_heads: int, head_dim: int, config: ModelConfig) -> None:
        super().__init__(config.d_model, num_heads * head_dim, config)
        self.num_heads, self.head_dim = num_heads, head_dim

    def forward(self, x: Tensor, mode: str = "project") -> Any:
        """project: [..., d] → [..., h, k].

        per_head: [..., h, d], another vector for every head → [..., h, k].
        reverse: [..., h, k] → ([..., h, d], [..., h]), so that for every y of width d
        reverse(x)[0]·y + reverse(x)[1] = x·project(y) in each head.
        """
        if mode == "project":
            return F.linear(x, self.weight, self.bias).unflatten(-1, (self.num_heads, -1))
        weight = self.weight.view(self.num_heads, self.head_dim, -1)
        per_head = x.reshape(-1, *x.shape[-2:]).transpose(0, 1)  # [h, rows, d or k]
        if mode == "per_head":
            result = torch.bmm(per_head, weight.transpose(1, 2)).transpose(0, 1)
            if self.bias is not None:
                result = result + self.bias.view(self.num_heads, self.head_dim)
            return result.reshape(*x.shape[:-1], self.head_dim)
        result = torch.bmm(per_head, weight).transpose(0, 1).reshape(*x.shape[:-1], -1)
        if self.bias is None:
            return result, x.new_zeros(x.shape[:-1])
        return result, (x * self.bias.view(self.num_heads, self.head_dim)).sum(-1)


class Attention(nn.Module):
    """Multi-head attention, of `hidden` on itself or on a `source`."""

    def __init__(
        self, config: ModelConfig, num_heads: int | None = None, *, output_norm: bool = True
    ) -> None:
        super().__init__()
        width = config.num_heads * config.head_dim
        self.num_heads = num_heads or config.num_heads
        self.head_dim = width // self.num_heads
        self.num_kv_heads = config.num_kv_heads if num_heads is None else self.num_heads
        self.qkv_norm, self.eps = config.qkv_norm, config.norm_eps
        self.output_norm = config.attention_output_norm if output_norm else "none"
        self.query = HeadLinear(self.num_heads, self.head_dim, config)
        self.key = HeadLinear(self.num_kv_heads, self.head_dim, config)
        self.value = HeadLinear(self.num_kv_heads, self.head_dim, config)
        self.output = Linear(width, config.d_model, config, into_residual=True)

    def normalise(self, heads: Tensor) -> Tensor:
        """The norm of Q, K and V, where the model has one."""
        return rms_normalise(heads, self.eps) if self.qkv_norm else heads

    def queries(self, hidden: Tensor, rotary: Rotary | None) -> Tensor:
        """[B, S, d] → [B, S, h, k], normalised and rotated."""
        return rotate(self.normalise(self.query(hidden)), rotary)

    def keys(self, hidden: Tensor, rotary: Rotary | None) -> Tensor:
        """[B, S, d] → [B, S, kv heads, k], normalised and rotated."""
        return rotate(self.normalise(self.key(hidden)), rotary)

    def values(self, hidden: Tensor) -> Tensor:
        """[B, S, d] → [B, S, kv heads, k], normalised."""
        return self.normalise(self.value(hidden))

    def combine(self, attended: Tensor) -> Tensor:
        """Attention results [..., h, k] → [..., d]."""
        if self.output_norm == "head":
            attended = rms_normalise(attended, self.eps)
        attended = attended.flatten(-2)
        if self.output_norm == "model":
            attended = rms_normalise(attended, self.eps)
        return self.output(attended)

    def forward(
        self,
        hidden: Tensor,
        source: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        is_causal: bool = False,
        rotary: Rotary | None = None,
        source_rotary: Rotary | None = None,
    ) -> Tensor:
        """`hidden` [B, S, d] attending to `source` [B, M, d] (itself when None) → [B, S, d].

        `mask`: bool, broadcastable to [B, h, S, M], True where attention is allowed.
        """
        if source is None:
            source, source_rotary = hidden, rotary
        attended = F.scaled_dot_product_attention(
            self.queries(hidden, rotary).transpose(1, 2),
            self.keys(source, source_rotary).transpose(1, 2),
            self.values(source).transpose(1, 2),
            attn_mask=mask,
            is_causal=is_causal,
            enable_gqa=self.num_kv_heads < self.num_heads,
        )
        return self.combine(attended.transpose(1, 2))


class FeedForward(nn.Module):
    """SwiGLU (down(silu(gate x)·up x)) or GELU (down(gelu(up x)))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        shape = (config.d_model, config.d_ffn)
        self.gate = Linear(*shape, config) if config.feed_forward == "swiglu" else None
        self.up = Linear(*shape, config)
        self.down = Linear(config.d_ffn, config.d_model, config, into_residual=True)

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., d] → [..., d]."""
        if self.gate is None:
            return self.down(gelu(self.up(hidden)))
        return self.down(swiglu(self.gate(hidden), self.up(hidden)))


class Block(nn.Module):
    """Pre-norm self-attention, then (with `cross_heads`) cross-attention, then feed-forward."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        cross_heads: int | None = None,
        norm_source: bool = False,
    ) -> None:
        super().__init__()
        self.attention_norm = make_norm(config)
        self.attention = Attention(config)
        if cross_heads is not None:
            self.cross_attention_norm = make_norm(config)
            self.source_norm = make_norm(config) if norm_source else nn.Identity()
            self.cross_attention = Attention(config, cross_heads)
        self.feed_forward_norm = make_norm(config)
        self.feed_forward = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        hidden: Tensor,
        source: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        is_causal: bool = False,
        rotary: Rotary | None = None,
        source_mask: Tensor | None = None,
        source_is_causal: bool = False,
        source_rotary: Rotary | None = None,
    ) -> Tensor:
        """`hidden` [B, S, d] → [B, S, d]; `source` [B, M, d] is what cross-attention reads."""
        normed = self.attention_norm(hidden)
        attended = self.attention(normed, mask=mask, is_causal=is_causal, rotary=rotary)
        hidden = hidden + self.dropout(attended)
        if source is not None:
            crossed = self.cross_attention(
                self.cross_attention_norm(hidden),
                self.source_norm(source),
                mask=source_mask,
                is_causal=source_is_causal,
                rotary=rotary,
                source_rotary=source_rotary,
            )
            hidden = hidden + self.dropout(crossed)
        return hidden + self.dropout(self.feed_forward(self.feed_forward_norm(hidden)))


def run_block(block: Callable[..., Tensor], config: ModelConfig, *args: Any, **kwargs: Any) -> Any:
    """Call `block`, keeping only its inputs for the backward pass where the config says so."""
    if config.activation_checkpointing and torch.is_grad_enabled():
        return checkpoint(block, *args, use_reentrant=False, **kwargs)
    return block(*args, **kwargs)


class PositionEmbedding(nn.Embedding):
    """Learned absolute positions, `rows` of them, drawn and scaled as the token embedding is."""

    def __init__(self, rows: int, config: ModelConfig) -> None:
        self.std = initial_std(config.d_model, config)
        super().__init__(rows, config.d_model)
        self.scale = math.sqrt(config.d_model) if config.scale_embedding else 1.0

    def reset_parameters(self) -> None:
        """Rows from N(0, std²)."""
        nn.init.normal_(self.weight, std=self.std)

    def forward(self, positions: Tensor) -> Tensor:
        """Positions [...] → [..., d]."""
        embedded = super().forward(positions)
        return embedded * self.scale if self.scale != 1.0 else embedded


class TiedEmbedding(nn.Module):
    """The one matrix [vocab, d] that embeds every input and scores every output."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.vocab_size, config.d_model))
        # A row scores d_model wide states: that is its fan-in.
        nn.init.normal_(self.weight, std=initial_std(config.d_model, config))
        self.scale = math.sqrt(config.d_model) if config.scale_embedding else 1.0

    def forward(
        self,
        x: Tensor,
        mode: str = "embed",
        targets: Tensor | None = None,
        loss_mask: Tensor | None = None,
        z_loss: float = 0.0,
    ) -> Any:
        """embed: ids [...] → [..., d].  logits: hidden [..., d] → [..., vocab].

        loss: hidden → LossTerms over the masked targets.  nll: hidden → nats of each target.
        """
        if mode == "embed":
            embedded = F.embedding(x, self.weight)
            return embedded * self.scale if self.scale != 1.0 else embedded
        if mode == "logits":
            return F.linear(x, self.weight)
        if targets is None or loss_mask is None:
            raise ValueError(f"mode={mode!r}: needs targets and loss_mask; give both")
        if mode == "loss":
            return LossTerms(*linear_cross_entropy(x, self.weight, targets, loss_mask, z_loss))
        return linear_token_nll(x, self.weight, targets, loss_mask)

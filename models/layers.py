"""The parts that blocks are composed of: norms, linear layers, feed-forward, embeddings.

Every parameter is used inside the forward of the module that owns it, so that ZeRO-3, which gathers
a module's own parameters around its forward, can run any of this.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.activations import gated_linear, gelu, gelu_linear, swiglu
from models.config import ModelConfig
from models.losses import linear_cross_entropy, linear_token_nll
from models.matmul import linear
from models.norms import RMSNorm, rms_norm


def rms_normalise(hidden: Tensor, eps: float) -> Tensor:
    """Parameter-free RMSNorm over the last dimension."""
    return rms_norm(hidden, eps)


def make_norm(config: ModelConfig) -> nn.Module:
    """The pre-norm of a block: RMSNorm or LayerNorm over d_model, with gain."""
    if config.norm == "rmsnorm":
        return RMSNorm(config.d_model, eps=config.norm_eps)
    return nn.LayerNorm(config.d_model, eps=config.norm_eps, bias=config.bias)


def initial_std(fan_in: int, config: ModelConfig) -> float:
    """Standard deviation of a matrix's first values."""
    return fan_in**-0.5 if config.initializer == "fan_in" else config.init_std


@torch.no_grad()
def draw_normal(weight: Tensor, std: float) -> None:
    """Fill `weight` from N(0, std²).

    Drawn in fp32 by the CPU's generator whatever the weight's own device and precision: a model
    starts from the same values on every device, and whether it is made whole or in slices.
    """
    if not weight.is_meta:
        weight.copy_(torch.empty_like(weight, dtype=torch.float32, device="cpu").normal_(std=std))


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
        draw_normal(self.weight, self.std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., fan_in] → [..., fan_out]."""
        return linear(x, self.weight, self.bias)


class Down(Linear):
    """The feed-forward's activation and its way back to d_model: of GELU, or of SwiGLU's two
    halves."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config.d_ffn, config.d_model, config, into_residual=True)
        self.recomputes = config.activation_checkpointing

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        """gelu(x), x [..., d_ffn], or with a gate silu(gate)·x, → [..., d_model]."""
        if self.recomputes:
            # Recomputation stops at the first thing that only this, a block's last product, keeps;
            # a Function of our own would have multiplied by then.
            x = gelu(x) if gate is None else swiglu(gate, x)
            return F.linear(x, self.weight, self.bias)
        if gate is None:
            return gelu_linear(x, self.weight, self.bias)
        return gated_linear(gate, x, self.weight, self.bias)


class FeedForward(nn.Module):
    """SwiGLU (down(silu(gate x)·up x)) or GELU (down(gelu(up x)))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        shape = (config.d_model, config.d_ffn)
        self.gate = Linear(*shape, config) if config.feed_forward == "swiglu" else None
        self.up = Linear(*shape, config)
        self.down = Down(config)

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., d] → [..., d]."""
        if self.gate is None:
            return self.down(self.up(hidden))
        return self.down(self.up(hidden), self.gate(hidden))


class PositionEmbedding(nn.Embedding):
    """Learned absolute positions, `rows` of them, drawn and scaled as the token embedding is."""

    def __init__(self, rows: int, config: ModelConfig) -> None:
        self.std = initial_std(config.d_model, config)
        super().__init__(rows, config.d_model)
        self.scale = math.sqrt(config.d_model) if config.scale_embedding else 1.0

    def reset_parameters(self) -> None:
        """Rows from N(0, std²)."""
        draw_normal(self.weight, self.std)

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
        draw_normal(self.weight, initial_std(config.d_model, config))
        self.scale = math.sqrt(config.d_model) if config.scale_embedding else 1.0

    def forward(
        self,
        x: Tensor,
        mode: str = "embed",
        targets: Tensor | None = None,
        loss_mask: Tensor | None = None,
        z_loss: float = 0.0,
        weights: Tensor | None = None,
    ) -> Any:
        """embed: ids [...] → [..., d].  logits: hidden [..., d] → [..., vocab].

        loss: hidden → LossTerms over the masked targets, `weights` as `linear_cross_entropy` has
        them.  nll: hidden → nats of each target.
        """
        if mode == "embed":
            embedded = F.embedding(x, self.weight)
            return embedded * self.scale if self.scale != 1.0 else embedded
        if mode == "logits":
            return F.linear(x, self.weight)
        if targets is None or loss_mask is None:
            raise ValueError(f"mode={mode!r}: needs targets and loss_mask; give both")
        if mode == "loss":
            return linear_cross_entropy(x, self.weight, targets, loss_mask, z_loss, weights)
        return linear_token_nll(x, self.weight, targets, loss_mask)

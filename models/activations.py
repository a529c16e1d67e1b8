"""The elementwise middle of the feed-forward, with what its backward pass needs and no more."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# gelu(x) ≈ x·½(1 + tanh u) = x·σ(2u), 2u = x·(LINEAR + CUBIC·x²)
_LINEAR = 2 * math.sqrt(2 / math.pi)
_CUBIC = _LINEAR * 0.044715
# Elements that the passes over one piece keep in a core's cache.
_BLOCK = 1 << 16


def gelu(x: Tensor) -> Tensor:
    """The tanh form of GELU.

    On a CPU torch's kernel spends most of an ENTP step in scalar tanh; the same function through
    the logistic sigmoid, which is vectorised, and with its derivative kept for the backward pass,
    takes half the time. What is kept is as large.
    """
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64):
        return F.gelu(x, approximate="tanh")
    return _SigmoidGelu.apply(x, torch.is_grad_enabled() and x.requires_grad)


class _SigmoidGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, needs_grad: bool) -> Tensor:
        x = x.contiguous()
        result = torch.empty_like(x)
        slope = torch.empty_like(x) if needs_grad else None
        flat, flat_result = x.view(-1), result.view(-1)
        squares, gates = x.new_empty(_BLOCK), x.new_empty(_BLOCK)
        for low in range(0, flat.numel(), _BLOCK):
            part, out = flat[low : low + _BLOCK], flat_result[low : low + _BLOCK]
            square, gate = squares[: part.numel()], gates[: part.numel()]
            torch.mul(part, part, out=square)
            torch.mul(square, _CUBIC, out=gate).add_(_LINEAR).mul_(part).sigmoid_()
            torch.mul(part, gate, out=out)
            if slope is not None:
                # d/dx x·σ(2u) = σ + x·σ·(1 − σ)·(LINEAR + 3·CUBIC·x²)
                into = slope.view(-1)[low : low + _BLOCK]
                square.mul_(3 * _CUBIC).add_(_LINEAR)
                torch.addcmul(out, out, gate, value=-1, out=into).mul_(square).add_(gate)
        if slope is not None:
            ctx.save_for_backward(slope)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (slope,) = ctx.saved_tensors
        return grad * slope, None


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate)·up, keeping its two inputs alone: silu(gate) is made again when it is needed."""
    return _SwiGLU.apply(gate, up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)

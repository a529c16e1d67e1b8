"""The middle of the feed-forward, keeping what its backward pass needs and no more."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.matmul import linear, times, times_transposed, transposed_times

# gelu(x) ≈ x·½(1 + tanh u) = x·σ(2u), 2u = x·(LINEAR + CUBIC·x²)
_LINEAR = 2 * math.sqrt(2 / math.pi)
_CUBIC = _LINEAR * 0.044715
# Elements that the passes over one piece keep in a core's cache, with three scratch pieces.
_BLOCK = 1 << 16


def gelu(x: Tensor) -> Tensor:
    """The tanh form of GELU."""
    return F.gelu(x, approximate="tanh")


def gelu_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The linear layer of gelu(x), keeping x alone.

    On a CPU torch's kernel spends most of an ENTP step in scalar tanh; the same function through
    the logistic sigmoid is vectorised. It is made again for the backward pass, beside its
    derivative: to keep both would be a third of what an ENTP keeps.

    Args:
        x: [..., k].
        weight: [n, k].
        bias: [n].
    Returns:
        [..., n].
    """
    is_plain = x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64)
    if is_plain or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return linear(gelu(x), weight, bias)
    result: Tensor = _GeluLinear.apply(x, weight, bias)
    return result


class _GeluLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        ctx.save_for_backward(rows, weight)
        return times_transposed(_gelu(rows), weight, bias).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        weight_grad = bias_grad = None
        if ctx.needs_input_grad[1]:
            # Before the other, and let go: both at once would be a chunk's peak.
            weight_grad = transposed_times(rows, _gelu(x))
        if ctx.needs_input_grad[2]:
            bias_grad = rows.sum(0)
        x_grad = times(rows, weight)
        for part, into, gate, slope in _blocks(x, x_grad):
            # d/dx x·σ(2u) = σ + x·σ·(1 − σ)·(2u)' and x·(2u)' = 3·2u − 2·LINEAR·x
            torch.add(gate, part, alpha=-2 / 3 * _LINEAR, out=slope)
            gate.sigmoid_()
            torch.ops.aten.sigmoid_backward(slope, gate, grad_input=slope)
            into.mul_(gate.add_(slope, alpha=3))
        return x_grad.view(*grad.shape[:-1], -1), weight_grad, bias_grad


def _gelu(x: Tensor) -> Tensor:
    """x·σ(2u) of a dense `x`."""
    result = torch.empty_like(x)
    for part, out, gate, _ in _blocks(x, result):
        torch.mul(part, gate.sigmoid_(), out=out)
    return result


def _blocks(x: Tensor, other: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Pieces of `x` and `other`, both dense, that stay in a cache; with each 2u of x, and
    scratch."""
    flat, flat_other = x.view(-1), other.view(-1)
    # A tensor and not a number, because only so is x ↦ LINEAR + CUBIC·x² one pass.
    constant = x.new_full((min(_BLOCK, flat.numel()),), _LINEAR)
    gates, scratch = torch.empty_like(constant), torch.empty_like(constant)
    for part, beside in zip(flat.split(_BLOCK), flat_other.split(_BLOCK), strict=True):
        count = len(part)
        gate = torch.addcmul(constant[:count], part, part, value=_CUBIC, out=gates[:count])
        yield part, beside, gate.mul_(part), scratch[:count]


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


def gated_linear(gate: Tensor, up: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The linear layer of silu(gate)·up, keeping gate and up but not their product.

    The product is a fifth of what a block keeps, and is made again in one more multiplication
    beside those that the backward pass has to do.

    Args:
        gate, up: [..., k].
        weight: [n, k].
        bias: [n].
    Returns:
        [..., n].
    """
    if torch.compiler.is_compiling() or torch.is_autocast_enabled(gate.device.type):
        return F.linear(swiglu(gate, up), weight, bias)
    result: Tensor = _GatedLinear.apply(gate, up, weight, bias)
    return result


class _GatedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(gate, up, weight)
        product = F.silu(gate).mul_(up)
        rows = product.reshape(-1, product.shape[-1])
        return times_transposed(rows, weight, bias).view(*gate.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        product_grad = times(rows, weight).view(gate.shape)
        activated = F.silu(gate)
        weight_grad = bias_grad = None
        if ctx.needs_input_grad[2]:
            product = (activated * up).reshape(-1, up.shape[-1])
            weight_grad = transposed_times(rows, product)
            del product
        if ctx.needs_input_grad[3]:
            bias_grad = rows.sum(0)
        up_grad = activated.mul_(product_grad)
        gate_grad = torch.ops.aten.silu_backward(product_grad.mul_(up), gate)
        return gate_grad, up_grad, weight_grad, bias_grad

"""Cross-entropy of a linear head, with z-loss, that never holds [batch, seq, vocab] logits.

The scored rows are taken first, so that an unscored position costs nothing; their logits exist a
few rows at a time. The gradient of a scalar loss is known as soon as its logits are, so it is taken
in the forward pass and only scaled in the backward pass: three matrix products for each row, as
with full logits, and no recomputation.

torch's own `F.linear_cross_entropy` chunks in the same way, and does not serve: it gives no log Z,
which z-loss needs, and has no weight for each target.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from models import head_rows
from models.autocast import lowered, outside_autocast
from models.matmul import add_transposed_times, times, times_transposed


class LossTerms(NamedTuple):
    """Sums over the scored targets of a batch, or of a part of one; 0-d unless said."""

    objective: Tensor
    """Differentiable: nll + z_loss·(log Z)², weighted, and an architecture's own terms."""
    nll: Tensor
    """Detached: plain cross-entropy in nats."""
    z: Tensor
    """Detached: (log Z)², Z the normaliser of the softmax."""
    row_nll: Tensor
    """[batch], detached: nll of each row of the batch."""


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    loss_mask: Tensor,
    z_loss: float = 0.0,
    weights: Tensor | None = None,
) -> LossTerms:
    """Loss of `softmax(hidden @ weight.T)` on the targets that `loss_mask` selects.

    Args:
        hidden: [batch, ..., d_model].
        weight: [vocab, d_model].
        targets: [batch, ...] int64, any value where the mask is False.
        loss_mask: [batch, ...] bool.
        z_loss: coefficient of (log Z)² (1e-4 in arXiv 2510.26622; T5X's form).
        weights: [batch, ...], factor of each target's part of the objective; not differentiated.

    Raises:
        ValueError: a scored target that is no row of `weight`; a GPU, which nobody waits for, stops
            with an assertion of its own.
    """
    hidden, weight = lowered(hidden), lowered(weight)
    rows = loss_mask.reshape(-1).nonzero().squeeze(1)
    _check_targets(targets.reshape(-1)[rows], weight.shape[0])
    flat = hidden.reshape(-1, hidden.shape[-1])
    scored_weights = None if weights is None else weights.detach().reshape(-1)[rows]
    objective, nll, z = _LinearCrossEntropy.apply(
        flat, weight, targets.reshape(-1), rows, z_loss, scored_weights, torch.is_grad_enabled()
    )
    of_row = rows // max(1, loss_mask[:1].numel())
    row_nll = nll.new_zeros(len(loss_mask)).index_add_(0, of_row, nll)
    return LossTerms(objective, nll.sum(), z.sum(), row_nll)


@torch.no_grad()
def linear_token_nll(hidden: Tensor, weight: Tensor, targets: Tensor, loss_mask: Tensor) -> Tensor:
    """Nats of each target, float32 of `targets`' shape, 0 where `loss_mask` is False.

    Raises:
        ValueError: as `linear_cross_entropy`.
    """
    hidden, weight = lowered(hidden), lowered(weight)
    rows = loss_mask.reshape(-1).nonzero().squeeze(1)
    _check_targets(targets.reshape(-1)[rows], weight.shape[0])
    flat = hidden.reshape(-1, hidden.shape[-1])
    result = torch.zeros(targets.numel(), device=hidden.device, dtype=torch.float32)
    for part in rows.split(_rows_at_once(weight)):
        softmax = _Softmax(flat[part].to(weight.dtype), weight, targets.reshape(-1)[part])
        result[part] = (softmax.log_z - softmax.target_logits).squeeze(1).float()
        del softmax  # else these logits would live beside the next part's
    return result.view(targets.shape)


def _check_targets(targets: Tensor, vocab_size: int) -> None:
    """Refuse `targets` [rows] that no logit stands for: their nll would be log Z alone."""
    if not targets.numel():
        return
    outside = (targets < 0) | (targets >= vocab_size)
    if targets.device.type != "cpu":
        torch._assert_async(~outside.any())
    elif outside.any():
        raise ValueError(
            f"targets={int(targets[outside][0])}: scored, and not in 0 … {vocab_size - 1} of "
            f"vocab_size={vocab_size}; mask such positions, or use the tokenizer of the model"
        )


def _rows_at_once(weight: Tensor) -> int:
    return head_rows.rows_at_once(weight.shape[0], on_cpu=weight.device.type == "cpu")


class _Softmax:
    """The softmax of a few rows' logits, one block of the vocabulary after the other.

    Attributes:
        blocks: (first row, past the last) of the weight that each block scores.
        targets: [rows, 1].
        target_logits, log_z: of each row, [rows, 1], in fp32 or more.
        exponentials: of each block, exp(logits − peak), [rows, block].
        normaliser: their sum over all blocks, [rows, 1].
    """

    def __init__(self, inputs: Tensor, weight: Tensor, targets: Tensor) -> None:
        vocab_size = weight.shape[0]
        width = head_rows.CPU_VOCABULARY if weight.device.type == "cpu" else vocab_size
        edges = range(0, vocab_size, width)
        self.blocks = [(low, min(low + width, vocab_size)) for low in edges]
        self.targets = targets.unsqueeze(1)
        logits = [times_transposed(inputs, weight[low:high]) for low, high in self.blocks]
        if weight.dtype in (torch.bfloat16, torch.float16):
            logits = [part.float() for part in logits]
        target_logits = torch.zeros_like(logits[0][:, :1])
        for part, (columns, inside) in zip(logits, self._target_columns(), strict=True):
            target_logits += part.gather(1, columns).mul_(inside)
        peak = torch.stack([part.amax(1, keepdim=True) for part in logits]).amax(0)
        self.exponentials = [part.sub_(peak).exp_() for part in logits]
        sums = [part.sum(1, keepdim=True) for part in self.exponentials]
        self.normaliser = torch.stack(sums).sum(0)
        self.target_logits, self.log_z = target_logits, peak + self.normaliser.log()

    def _target_columns(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Of each block the targets' columns, and whether they lie in it (else any column)."""
        for low, high in self.blocks:
            columns = self.targets - low
            inside = (columns >= 0) & (columns < high - low)
            yield columns.clamp(0, high - low - 1), inside

    def gradients(self, z_loss: float, weights: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Rows of the weight, and d objective / d logits of them: weights·(softmax·(1 +
        2·z_loss·log Z) − onehot(target)), made in place of the exponentials.

        `weights`: [rows, 1], of the targets.
        """
        factor = (1.0 + 2.0 * z_loss * self.log_z).mul_(weights).div_(self.normaliser)
        parts = zip(self.blocks, self.exponentials, self._target_columns(), strict=True)
        for (low, high), part, (columns, inside) in parts:
            part.mul_(factor).scatter_add_(1, columns, -weights * inside)
            yield slice(low, high), part


def _back(
    logit_grads: Iterator[tuple[slice, Tensor]],
    inputs: Tensor,
    weight: Tensor,
    hidden_grad: Tensor | None,
    weight_grad: Tensor | None,
) -> Tensor:
    """The gradient of `inputs` [rows, d_model], where `hidden_grad` wants one, in fp32 or more;
    that of `weight` is added to `weight_grad`."""
    wide = torch.promote_types(inputs.dtype, torch.float32)
    input_grad = torch.zeros_like(inputs, dtype=wide)
    for block, logit_grad in logit_grads:
        logit_grad = logit_grad.to(weight.dtype)
        if hidden_grad is not None:
            input_grad += times(logit_grad, weight[block])
        if weight_grad is not None:
            add_transposed_times(weight_grad[block], logit_grad, inputs)
    return input_grad


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    @outside_autocast
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        rows: Tensor,
        z_loss: float,
        weights: Tensor | None,
        needs_grad: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The objective, and of each of `rows` the nll and (log Z)², [rows]."""
        accumulate = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        nll = torch.empty(len(rows), device=hidden.device, dtype=accumulate)
        log_z = torch.empty_like(nll)
        weights = torch.ones_like(nll) if weights is None else weights.to(accumulate)
        hidden_grad = torch.zeros_like(hidden) if needs_grad and ctx.needs_input_grad[0] else None
        weight_grad = (
            torch.zeros(weight.shape, device=weight.device, dtype=accumulate)
            if needs_grad and ctx.needs_input_grad[1]
            else None
        )
        at_once = _rows_at_once(weight)
        for start in range(0, len(rows), at_once):
            here = slice(start, start + at_once)
            part = rows[here]
            inputs = hidden[part].to(weight.dtype)
            softmax = _Softmax(inputs, weight, targets[part])
            log_z[here] = softmax.log_z.squeeze(1)
            nll[here] = (softmax.log_z - softmax.target_logits).squeeze(1)
            if hidden_grad is not None or weight_grad is not None:
                logit_grads = softmax.gradients(z_loss, weights[here].unsqueeze(1))
                input_grad = _back(logit_grads, inputs, weight, hidden_grad, weight_grad)
                del logit_grads
                if hidden_grad is not None:
                    hidden_grad[part] = input_grad.to(hidden.dtype)
            # Else these logits would live beside the next part's.
            del softmax
        ctx.hidden_grad, ctx.weight_grad, ctx.weight_dtype = hidden_grad, weight_grad, weight.dtype
        ctx.is_spent = False
        z = log_z.square()
        ctx.mark_non_differentiable(nll, z)
        return (weights * (nll + z_loss * z)).sum(), nll, z

    @staticmethod
    @once_differentiable
    @outside_autocast
    def backward(ctx: Any, objective_grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        # Scaled in place: a second copy of the weight's gradient would be the step's peak.
        if ctx.is_spent:
            raise RuntimeError("the loss was back-propagated before; compute it anew")
        hidden_grad, weight_grad = ctx.hidden_grad, ctx.weight_grad
        ctx.hidden_grad, ctx.weight_grad, ctx.is_spent = None, None, True
        if hidden_grad is not None:
            hidden_grad.mul_(objective_grad)
        if weight_grad is not None:
            weight_grad = weight_grad.mul_(objective_grad).to(ctx.weight_dtype)
        return hidden_grad, weight_grad, None, None, None, None, None

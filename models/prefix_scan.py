"""Attention of ENTP's first bidirectional layer, in every prefix by one pass over the keys.

There a token's query, key and value are the same in every prefix. Appending key t to a prefix moves
what token i reads towards value t:

    out[i, t] = out[i, t−1] + β·(v_t − out[i, t−1])    with β = exp(s_it − log Σ_{j≤t} exp s_ij)

so all prefixes cost one pass over the keys, and no exponent is ever positive. The pass is cut into
chunks that are computed from the longest prefixes to the shortest: each starts from what its tokens
had read before it, and its backward pass from the gradient that the chunks after it have left. So
what does not belong to one chunk is computed, and back-propagated, once. Rounding would add up over
the keys: all of it is done in at least fp32, and the results are rounded once.

Shape letters: B rows, S tokens of the longest prefix, P prefixes, h heads, k head width, d width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.autocast import outside_autocast
from models.compiling import left_eager
from models.prefix_attention import Prefixes, wide


@dataclass(frozen=True)
class Run:
    """Consecutive prefixes: what is computed at once."""

    ends: range
    """Their last tokens; none for a chunk that has nothing to score and reads token 0 alone."""
    before: Tensor | None
    """What the tokens before `ends` have read without them, [tokens, B, h, k]; None where the
    shortest prefix of all is among them."""
    is_final: bool
    """Whether no other follows: its backward pass goes on to what all share."""
    scan: Scan

    @property
    def hidden(self) -> Tensor:
        """[S, B, d], the layer's input."""
        return self.scan.hidden

    def at_pairs(self, prefixes: Prefixes) -> tuple[Tensor, Tensor]:
        """Of the pairs the layer's input [pairs, B, d] and what attention read [pairs, B, h, k]."""
        return self.scan.read(self)


class Scan:
    """All that the chunks of some rows share, and the gradients that they leave.

    Args:
        hidden: [B, S, d], the layer's input.
        scores: [B, h, S, S], queries by keys, scaled.
        values: [B, S, h, k].
        first: the last token of the shortest prefix.
    """

    def __init__(self, hidden: Tensor, scores: Tensor, values: Tensor, first: int) -> None:
        self.first, self.size = first, hidden.shape[1]
        self.formats = hidden.dtype, values.dtype
        self.hidden = wide(hidden).transpose(0, 1).contiguous()
        self.values = wide(values).transpose(0, 1).contiguous()
        self.entries, self.shares = _Enter.apply(wide(scores), self.values, first)
        self.read: Callable[[Run], tuple[Tensor, Tensor]] = left_eager(_read)
        """`Run.at_pairs`."""
        self._shared = (self.hidden, self.values, self.entries, self.shares)
        self._detached = tuple(x.detach() for x in self._shared)
        self._needs_grad = any(x.requires_grad for x in self._shared)
        self.gradients: tuple[Tensor, ...] = ()
        self.carried: Tensor | None = None
        self.left = self.size
        """Of the runs not yet back-propagated, the prefixes' last token and one more."""

    def runs(self, parts: Sequence[range]) -> Iterator[Run]:
        """A run for each of `parts`, ascending and without a gap where not empty, last ones first.

        What was read before a run is kept for about √n of the n parts at a time, and is read again
        from there for those between them.
        """
        full = [part for part in parts if part]
        stride = math.isqrt(len(full)) or 1
        kept: list[Tensor | None] = [None]
        for start in range(stride, len(full), stride):
            passed = range(full[start - stride].start, full[start].start)
            kept.append(self._read_on(kept[-1], passed))
        fine: list[Tensor | None] = []
        number = len(full)
        for place in reversed(range(len(parts))):
            before = None
            if parts[place]:
                number -= 1
                if not fine:
                    fine.append(kept.pop())
                    for part in full[number - number % stride : number]:
                        fine.append(self._read_on(fine[-1], part))
                before = fine.pop()
            yield Run(parts[place], before, place == 0, self)

    @torch.no_grad()
    def _read_on(self, before: Tensor | None, ends: range) -> Tensor:
        """What tokens 0 … ends[-1] have read in the last of the prefixes `ends`."""
        _, values, entries, shares = self._detached
        read = entries[: ends.stop].clone()
        if before is None:
            ends = ends[1:]
        else:
            read[: len(before)] = before
        for t in ends:
            torch.lerp(read[:t], values[t], shares[t - self.first, :t], out=read[:t])
        return read


class _Enter(torch.autograd.Function):
    """What each token reads in the shortest prefix that has it, [S, B, h, k]; and the shares β that
    later keys take, [P, S, B, h, 1], by key from `first` and by token."""

    @staticmethod
    @outside_autocast
    def forward(ctx: Any, scores: Tensor, values: Tensor, first: int) -> tuple[Tensor, Tensor]:
        first_sums = scores[..., : first + 1].logsumexp(-1, keepdim=True)
        log_sums = torch.cat([first_sums, scores[..., first + 1 :]], -1).logcumsumexp(-1)
        positions = torch.arange(scores.shape[-1], device=scores.device)
        entry = positions.clamp(min=first)
        places = (entry - first).view(1, 1, -1, 1).expand(*scores.shape[:3], 1)
        weights = (scores - log_sums.gather(-1, places)).masked_fill_(
            positions > entry.unsqueeze(1), -torch.inf
        )
        weights.exp_()
        shares = (scores[..., first:] - log_sums).exp_().permute(3, 2, 0, 1).contiguous()
        entries = (weights @ values.permute(1, 2, 0, 3)).permute(2, 0, 1, 3).contiguous()
        shares = shares.unsqueeze(-1)
        ctx.save_for_backward(weights, shares, values)
        return entries, shares

    @staticmethod
    @once_differentiable
    @outside_autocast
    def backward(ctx: Any, entries_grad: Tensor, shares_grad: Tensor) -> tuple[Tensor | None, ...]:
        weights, beta, values = ctx.saved_tensors
        count, size = beta.shape[:2]
        first = size - count
        entries_grad = entries_grad.permute(1, 2, 0, 3)  # [B, h, S, k]
        values_grad = (weights.transpose(2, 3) @ entries_grad).permute(2, 0, 1, 3)
        # β_t = σ(s_t − log Z_{t−1}); carried[t] is minus the gradient of log Z_t.
        alpha = 1 - beta
        gamma = (shares_grad * beta).mul_(alpha).squeeze(-1)
        alpha = alpha.squeeze(-1)
        carried = torch.zeros_like(gamma)
        for p in range(count - 2, -1, -1):
            torch.addcmul(gamma[p + 1], alpha[p + 1], carried[p + 1], out=carried[p])
        positions = torch.arange(size, device=beta.device)
        entry = positions.clamp(min=first)
        weights_grad = entries_grad @ values.permute(1, 2, 3, 0)
        entry_carried = carried[entry - first, positions].permute(1, 2, 0).unsqueeze(-1)
        expected = (weights_grad * weights).sum(-1, keepdim=True)
        scores_grad = weights_grad.sub_(expected + entry_carried).mul_(weights)
        # A key that is later than a token's entry moves it by β alone.
        is_later = (positions[first:].unsqueeze(1) > entry)[:, :, None, None]  # [P, S]
        moved = torch.where(is_later, gamma - beta.squeeze(-1) * carried, 0)
        scores_grad[..., first:] += moved.permute(2, 3, 1, 0)
        return scores_grad, values_grad, None


def _read(run: Run) -> tuple[Tensor, Tensor]:
    scan = run.scan
    shared: tuple[Tensor, ...] = scan._shared
    if not run.is_final:
        shared = tuple(x.requires_grad_(scan._needs_grad) for x in scan._detached)
    hidden, mixed = _Read.apply(*shared, run)
    return hidden, mixed


class _Read(torch.autograd.Function):
    """The pairs of one run. Gradients of what all runs share are added up in the scan, which the
    final run hands on."""

    @staticmethod
    @outside_autocast
    def forward(
        ctx: Any,
        hidden: Tensor,
        values: Tensor,
        entries: Tensor,
        shares: Tensor,
        run: Run,
    ) -> tuple[Tensor, Tensor]:
        ctx.run, scan = run, run.scan
        if not run.ends:
            # A token alone reads its own value.
            return hidden[:1].to(scan.formats[0]), values[:1].to(scan.formats[1])
        lengths = [end + 1 for end in run.ends]
        inputs = hidden.new_empty(sum(lengths), *hidden.shape[1:])
        out = values.new_empty(sum(lengths), *values.shape[1:])
        low, previous = 0, run.before
        for t in run.ends:
            inputs[low : low + t + 1] = hidden[: t + 1]
            read = out[low : low + t + 1]
            if previous is None:
                read.copy_(entries[: t + 1])
            else:
                torch.lerp(previous[:t], values[t], shares[t - scan.first, :t], out=read[:t])
                read[t] = entries[t]
            low, previous = low + t + 1, read
        out = out.to(scan.formats[1])
        ctx.save_for_backward(values, shares, out)
        return inputs.to(scan.formats[0]), out

    @staticmethod
    @once_differentiable
    @outside_autocast
    def backward(ctx: Any, hidden_grad: Tensor, grad: Tensor) -> tuple[Tensor | None, ...]:
        run: Run = ctx.run
        scan = run.scan
        if not scan.gradients:
            scan.gradients = tuple(torch.zeros_like(x) for x in scan._detached)
        gradients = scan.gradients
        if not run.ends:
            gradients[0][:1] += hidden_grad
            gradients[1][:1] += grad
        else:
            if run.ends.stop != scan.left:
                raise RuntimeError(
                    "loss_chunks: back-propagate each objective before asking for more"
                )
            scan.left = run.ends.start
            _back(ctx.saved_tensors, run, wide(hidden_grad), wide(grad))
        if not run.is_final:
            return (None,) * 5
        scan.gradients, scan.carried, scan.left = (), None, scan.size
        return *gradients, None


def _back(saved: Sequence[Tensor], run: Run, inputs_grad: Tensor, grad: Tensor) -> None:
    """Add a run's part to its scan's gradients, and leave there what goes on to shorter prefixes
    than its own."""
    values, shares, out = saved
    scan = run.scan
    hidden_grad, values_grad, entries_grad, shares_grad = scan.gradients
    high = len(grad)
    # through[i]: gradient of what token i has read, later prefixes included.
    through = torch.zeros_like(grad[: run.ends.stop])
    if scan.carried is not None:
        through.copy_(scan.carried)
    scratch = torch.empty_like(through)
    for t in reversed(run.ends):
        low = high - t - 1
        hidden_grad[: t + 1] += inputs_grad[low:high]
        through[: t + 1] += grad[low:high]
        if t == scan.first:
            entries_grad[: t + 1] += through[: t + 1]
            break
        entries_grad[t] = through[t]
        gradient, p, part = through[:t], t - scan.first, scratch[:t]
        previous = out[low - t : low] if t > run.ends.start else run.before
        assert previous is not None  # only the run of the shortest prefix starts from nothing
        torch.sub(values[t], previous, out=part).mul_(gradient)
        torch.sum(part, -1, keepdim=True, out=shares_grad[p, :t])
        torch.mul(gradient, shares[p, :t], out=part)
        torch.sum(part, 0, out=values_grad[t])
        gradient -= part
        high = low
    scan.carried = through[: run.ends.start]

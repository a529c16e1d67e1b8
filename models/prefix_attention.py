"""Attention inside every prefix of a sequence at once: what exact ENTP training needs.

Prefix t holds tokens 0..t. Its (token, prefix) pairs are stored packed and prefix after prefix,
in tensors [pairs, B, ...]: prefix t's part is the t + 1 rows from `Prefixes.offsets`. Nothing is
padded.

Shape letters: B batch, S tokens, P prefixes, h heads, k head width, w any width.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.autocast import lowered, outside_autocast


@dataclass(frozen=True)
class Prefixes:
    """Prefixes of a sequence by their `lengths`, ascending, and where their pairs are packed."""

    lengths: tuple[int, ...]
    device: torch.device

    @property
    def longest(self) -> int:
        """Tokens of the last prefix."""
        return self.lengths[-1]

    @property
    def offsets(self) -> list[int]:
        """First packed row of each prefix, and one past the last: P + 1 numbers."""
        return _offsets(self.lengths)

    @property
    def tokens(self) -> Tensor:
        """[pairs]: the token of every pair."""
        return _tokens(self.lengths, self.device)

    @property
    def ends(self) -> Tensor:
        """[P]: packed row of each prefix's last token."""
        return _ends(self.lengths, self.device)

    @property
    def ranges(self) -> list[tuple[int, int, int]]:
        """Of each prefix: its number from 0, its first packed row and one past its last."""
        offsets = self.offsets
        return [(p, offsets[p], offsets[p + 1]) for p in range(len(offsets) - 1)]

    def split(self, packed: Tensor) -> list[Tensor]:
        """Views of `packed`, one for each prefix."""
        return list(packed.split(list(self.lengths)))


@lru_cache(maxsize=64)
def _offsets(lengths: tuple[int, ...]) -> list[int]:
    return [0, *itertools.accumulate(lengths)]


# The two below are built as ordinary tensors even in inference mode, whose own a later backward
# pass could not save.
@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _tokens(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.cat([torch.arange(n, device=device) for n in lengths])


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _ends(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(_offsets(lengths)[1:], device=device) - 1


def at_pairs(tokens: Tensor, prefixes: Prefixes) -> Tensor:
    """`tokens` [S, ...] at every pair that is a token's, [pairs, ...]."""
    result: Tensor = _AtPairs.apply(tokens, prefixes)
    return result


class _AtPairs(torch.autograd.Function):
    # Indexing's own gradient adds a token's prefixes one after the other in the tensor's format,
    # which in bf16 loses the later ones.

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, prefixes: Prefixes) -> Tensor:
        ctx.prefixes, ctx.shape = prefixes, tokens.shape
        return tokens[prefixes.tokens]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.new_zeros(ctx.shape, dtype=torch.promote_types(grad.dtype, torch.float32))
        for _, low, high in ctx.prefixes.ranges:
            total[: high - low] += grad[low:high]
        return total.to(grad.dtype), None


def scaled_scores(queries: Tensor, keys: Tensor) -> Tensor:
    """Of `queries` and `keys` [B, S, h, k] the scores [B, h, S, S] in at least fp32: rounded to
    bf16, each would err in all the prefixes that are made of it."""
    with torch.autocast(queries.device.type, enabled=False):
        queries = wide(queries) * queries.shape[-1] ** -0.5
        return queries.transpose(1, 2) @ wide(keys).permute(0, 2, 3, 1)


def wide(x: Tensor) -> Tensor:
    """`x` in at least fp32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def full_attention(queries: Tensor, keys: Tensor, values: Tensor, prefixes: Prefixes) -> Tensor:
    """Bidirectional attention inside every prefix.

    Args:
        queries: [pairs, B, h, k].
        keys, values: [pairs, B, kv heads, k].
    Returns:
        [pairs, B, h, k].
    """
    grouped = keys.shape[2] < queries.shape[2]
    if not grouped and _takes_flash(queries):
        result: Tensor = _FlashAttention.apply(
            lowered(queries), lowered(keys), lowered(values), prefixes
        )
        return result
    parts = zip(
        *(prefixes.split(x.permute(0, 2, 1, 3)) for x in (queries, keys, values)), strict=True
    )
    # Each part is [tokens, h, B, k]; attention wants [B, h, tokens, k].
    results = [
        F.scaled_dot_product_attention(
            q.transpose(0, 2), k.transpose(0, 2), v.transpose(0, 2), enable_gqa=grouped
        ).permute(2, 0, 1, 3)
        for q, k, v in parts
    ]
    return torch.cat(results)


def _takes_flash(queries: Tensor) -> bool:
    """Whether torch's fused attention on a CPU may be called by its own name."""
    return (
        queries.device.type == "cpu"
        and torch.backends.cuda.flash_sdp_enabled()
        and not torch.compiler.is_compiling()
    )


class _FlashAttention(torch.autograd.Function):
    # One node for all prefixes, that writes where the packed result and gradients are: of a few
    # tokens attention costs less than splitting, turning and joining as operations of their own.

    @staticmethod
    @outside_autocast
    def forward(
        ctx: Any, queries: Tensor, keys: Tensor, values: Tensor, prefixes: Prefixes
    ) -> Tensor:
        out = torch.empty_like(queries)
        log_sums = []
        for q, k, v, into in _turned(prefixes, queries, keys, values, out):
            attended, log_sum = _flash(q, k, v)
            into.copy_(attended)
            log_sums.append(log_sum)
        ctx.prefixes, ctx.log_sums = prefixes, log_sums
        ctx.save_for_backward(queries, keys, values, out)
        return out

    @staticmethod
    @once_differentiable
    @outside_autocast
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        gradients = [torch.empty_like(x) for x in saved[:3]]
        parts = _turned(ctx.prefixes, grad, *saved, *gradients)
        for (g, q, k, v, out, *into), log_sum in zip(parts, ctx.log_sums, strict=True):
            found = _flash_backward(g, q, k, v, out, log_sum, 0.0, False)
            for part, gradient in zip(into, found, strict=True):
                part.copy_(gradient)
        return *gradients, None


def _turned(prefixes: Prefixes, *packed: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Of `packed` [pairs, B, h, k] each prefix's [B, h, tokens, k]."""
    lengths = list(prefixes.lengths)
    return zip(*(x.permute(1, 2, 0, 3).split(lengths, 2) for x in packed), strict=True)


_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

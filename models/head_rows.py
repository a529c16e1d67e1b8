"""How many rows of logits the head holds at once, and what that takes. Imports no torch."""

from __future__ import annotations

# A matrix product wants many rows: on a CPU 256 are nearly as fast as any number, 64 take nearly
# twice as long. What follows the product reads its logits six times over, so on a CPU the
# vocabulary comes in blocks that stay in a cache.
CPU_ROWS, CPU_ELEMENTS, CPU_VOCABULARY = 256, 1 << 21, 4096
GPU_ELEMENTS = 1 << 26


def rows_at_once(vocab_size: int, *, on_cpu: bool) -> int:
    """Rows whose logits models/losses.py holds at once."""
    return max(CPU_ROWS, (CPU_ELEMENTS if on_cpu else GPU_ELEMENTS) // vocab_size)


def head_bytes(
    vocab_size: int, d_model: int, *, states: int, scored: int, width: int, on_cpu: bool
) -> int:
    """Bytes that `linear_cross_entropy` holds at its fullest moment.

    `states` hidden states, each with its gradient; the embedding's gradient in fp32; and the logits
    of one part of the `scored` rows in fp32, and in bf16 the product that they are made of.
    """
    rows = min(scored, rows_at_once(vocab_size, on_cpu=on_cpu))
    of_logit = 4 + (width if width < 4 else 0)
    logits = rows * vocab_size * of_logit + rows * d_model * (width + 4)
    if width < 4:
        # Or the part's share of the embedding's gradient, before it is added.
        product = rows * vocab_size * (4 + width) + vocab_size * d_model * width
        logits = max(logits, product)
    return 2 * states * d_model * width + vocab_size * d_model * 4 + logits


def nll_bytes(
    vocab_size: int, d_model: int, *, states: int, scored: int, width: int, on_cpu: bool
) -> int:
    """Bytes that `linear_token_nll` holds at its fullest moment, the hidden states included: as
    `head_bytes`, without a gradient; and the place and the result of each row."""
    rows = min(scored, rows_at_once(vocab_size, on_cpu=on_cpu))
    of_logit = 4 + (width if width < 4 else 0)
    logits = rows * vocab_size * of_logit + rows * d_model * width
    return states * (d_model * width + 4) + scored * 8 + logits

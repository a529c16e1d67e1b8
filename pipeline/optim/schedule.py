"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math


def learning_rate(
    step: int,
    *,
    schedule: str,
    peak: float,
    steps: int,
    warmup_steps: int,
    final_fraction: float,
) -> float:
    """The learning rate of optimizer step `step`, counted from 0.

    Linear warm-up reaches `peak` at step `warmup_steps`; then `constant`, `linear` or `cosine`
    falls to `final_fraction · peak` at the last step.
    """
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    if schedule == "constant":
        return peak
    span = max(1, steps - 1 - warmup_steps)
    progress = min(1.0, (step - warmup_steps) / span)
    fall = 1 - progress if schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return peak * (final_fraction + (1 - final_fraction) * fall)

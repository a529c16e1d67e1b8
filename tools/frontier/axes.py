"""Axes: where ticks go, how numbers read, and the fitted frontier as a curve."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
BEYOND = 10.0  # how far past the greatest fitted budget a curve is continued, marked as such
CURVE_POINTS = 60


def decimal_ticks(low: float, high: float, most: int) -> list[float]:
    """At most `most` round numbers, evenly spaced, within [low, high]."""
    if not high > low:
        return [low]
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def power_ticks(low: float, high: float, most: int) -> list[float]:
    """Powers of ten within [low, high]; with 2 and 5 times them when there are few."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for multiples in ((1, 2, 5), (1, 3), (1,)):
        ticks = [m * 10.0**e for e in exponents for m in multiples if low <= m * 10.0**e <= high]
        if len(ticks) <= most:
            return ticks
    return ticks[:: math.ceil(len(ticks) / most)]


def num(value: float) -> str:
    """A tick's number, short."""
    return f"{value:.6g}"


def power(value: float) -> str:
    """`2e12` as 2×10¹²."""
    digits, _, exponent_text = f"{value:.3e}".partition("e")
    factor, exponent = float(digits), int(exponent_text)
    ten = "10" + str(exponent).translate(SUPERSCRIPTS)
    return ten if factor == 1 else f"{factor:g}×{ten}"


def short_count(value: float) -> str:
    """`1234567` as 1.23M."""
    for limit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.3g}{letter}"
    return f"{value:.3g}"


def fit_curve(found: Mapping[str, Any]) -> list[tuple[list[float], list[float], bool]]:
    """(FLOPs, loss, whether extrapolated) of the optimum that approach 3 gives.

    The first part spans the budgets that were fitted; the second goes on beyond them.
    """
    import numpy as np

    from tools.frontier import approach3

    constants = {**found["constants"], **found["exponents"]}
    low, high = found["fitted_flops"]
    k = found["flops_over_params_tokens"]["typical"]
    parts = []
    for start, end, beyond in ((low, high, False), (high, high * BEYOND, True)):
        flops = np.geomspace(start, end, CURVE_POINTS)
        best = [approach3.allocation(constants, float(c), k) for c in flops]
        params, tokens = (np.array(column) for column in zip(*best, strict=True))
        loss = approach3.predict(constants, params, tokens)
        parts.append((flops.tolist(), loss.tolist(), beyond))
    return parts

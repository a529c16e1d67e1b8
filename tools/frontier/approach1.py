"""Approach 1: the envelope of training curves (Hoffmann et al. 2022, section 3.1).

At each of 1,500 log-spaced budgets, the run with the lowest loss gives N_opt and D_opt; both are
then power laws of the budget, N_opt = k_N·C^a and D_opt = k_D·C^b.

Curves are interpolated linearly in the logarithms and never continued beyond their ends. A budget
counts only when a smaller and a larger size were measured there too: at the rim of a sweep, the
winner is whoever was there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tools.frontier.fitting import (
    MIN_SIZES,
    Array,
    Curve,
    Refused,
    num_distinct,
    num_sizes,
    power_law,
    require_sizes,
)

NUM_BUDGETS = 1500
MIN_WINNERS = 3  # sizes that are best somewhere; fewer make no line


@dataclass(frozen=True)
class Winners:
    """The best run at each budget: arrays of [budgets]."""

    flops: Array
    params: Array
    tokens: Array


def winners(curves: Sequence[Curve], min_sizes: int = MIN_SIZES) -> Winners:
    """The best run at each budget where a smaller and a larger size were measured too.

    Raises:
        Refused: for fewer than `min_sizes` sizes with a curve, or no such budget.
    """
    curves = [curve for curve in curves if len(curve.flops) > 1]
    if not curves:
        raise Refused("no run has more than one evaluation; training curves are needed")
    require_sizes(num_sizes(curves), min_sizes)
    lowest = min(curve.flops[0] for curve in curves)
    highest = max(curve.flops[-1] for curve in curves)
    budgets = np.geomspace(lowest, highest, NUM_BUDGETS)
    loss, tokens = (np.full((len(curves), NUM_BUDGETS), np.nan) for _ in range(2))
    for row, curve in enumerate(curves):
        there = (budgets >= curve.flops[0]) & (budgets <= curve.flops[-1])
        x, xs = np.log(budgets[there]), np.log(curve.flops)
        loss[row, there] = np.exp(np.interp(x, xs, np.log(curve.loss)))
        tokens[row, there] = np.exp(np.interp(x, xs, np.log(curve.tokens)))
    params = np.array([curve.params for curve in curves])
    there = ~np.isnan(loss)
    best = np.argmin(np.where(there, loss, np.inf), axis=0)
    size = params[best]
    smallest = np.min(np.where(there, params[:, None], np.inf), axis=0)
    largest = np.max(np.where(there, params[:, None], 0.0), axis=0)
    interior = (smallest < size) & (size < largest)
    if not interior.any():
        raise Refused("at no budget is the best size between two others: no interior minimum")
    column = np.flatnonzero(interior)
    return Winners(budgets[column], size[column], tokens[best[column], column])


def fit(curves: Sequence[Curve], weights: Array, *, replicate: bool = False) -> dict[str, float]:
    """k_N, a, k_D and b over the runs of positive weight. Raises Refused."""
    present = [curve for curve, weight in zip(curves, weights, strict=True) if weight > 0]
    found = winners(present, MIN_WINNERS if replicate else MIN_SIZES)
    num_winners = num_distinct(found.params)
    if num_winners < (2 if replicate else MIN_WINNERS):
        raise Refused(
            f"only {num_winners} size(s) are ever the best between two others; "
            f"{MIN_WINNERS} are needed for a slope"
        )
    k_n, a = power_law(found.flops, found.params)
    k_d, b = power_law(found.flops, found.tokens)
    return {"k_N": k_n, "a": a, "k_D": k_d, "b": b}


def allocation(constants: Mapping[str, float], flops: float) -> tuple[float, float]:
    """(N_opt, D_opt) at a budget of `flops`."""
    return (
        constants["k_N"] * flops ** constants["a"],
        constants["k_D"] * flops ** constants["b"],
    )

"""Approach 2: isoFLOP parabolas (Hoffmann et al. 2022, section 3.2).

At each budget the loss of several sizes is a parabola in log N, whose minimum is N_opt; over the
budgets, N_opt = k_N·C^a and D_opt = k_D·C^b.

Budgets are those the runs ended at, where enough sizes share one; otherwise training curves are
read (interpolated, never continued) at log-spaced budgets. The slopes are sound; the intercepts
k_N and k_D are biased even without noise when α ≠ β or the sizes are wide or off-centre (arXiv
2603.22339).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tools.frontier.fitting import (
    MIN_SIZES,
    MIN_SIZES_REPLICATE,
    SAME,
    Array,
    Curve,
    Refused,
    num_distinct,
    num_sizes,
    power_law,
)

MIN_BUDGETS = 3
NUM_INTERPOLATED = 10
FAR = 3.0  # half-ranges of ln N; a resample's flat parabola may have its vertex anywhere
SAME_BUDGET = 0.05  # relative gap below which runs ended at one budget: steps are whole numbers


@dataclass(frozen=True)
class Slice:
    """The runs measured at one budget: arrays of [runs there]."""

    flops: float
    run: NDArray[np.int64]
    params: Array
    tokens: Array
    loss: Array
    interpolated: bool


@dataclass(frozen=True)
class Minimum:
    """The bottom of a budget's parabola."""

    flops: float
    params: float
    tokens: float
    loss: float
    curvature: float  # second derivative of the loss in ln N
    sizes: int


def slices(curves: Sequence[Curve]) -> list[Slice]:
    """The budgets to fit: shared final ones if there are enough, interpolated ones otherwise.

    Raises Refused when neither is possible.
    """
    exact = [s for s in _shared_budgets(curves) if num_distinct(s.params) >= MIN_SIZES]
    if len(exact) >= MIN_BUDGETS:
        return exact
    interpolated = _interpolated_budgets([c for c in curves if len(c.flops) > 1], curves)
    if interpolated:
        return interpolated
    raise Refused(
        f"fewer than {MIN_BUDGETS} budgets at which {MIN_SIZES} sizes were measured "
        f"({len(exact)} shared by final evaluations, none where training curves overlap; "
        f"{num_sizes(curves)} sizes in all)"
    )


def _shared_budgets(curves: Sequence[Curve]) -> list[Slice]:
    finals = np.array([curve.flops[-1] for curve in curves])
    order = np.argsort(finals, kind="stable")
    breaks = np.flatnonzero(np.diff(np.log(finals[order])) > np.log1p(SAME_BUDGET)) + 1
    found = []
    for group in np.split(order, breaks):
        # Neighbours chain: a smear of unrelated runs is no budget.
        if finals[group].max() <= finals[group].min() * (1 + 2 * SAME_BUDGET):
            found.append(
                Slice(
                    flops=float(np.exp(np.mean(np.log(finals[group])))),
                    run=group,
                    params=np.array([curves[i].params for i in group]),
                    tokens=np.array([curves[i].tokens[-1] for i in group]),
                    loss=np.array([curves[i].loss[-1] for i in group]),
                    interpolated=False,
                )
            )
    return found


def _interpolated_budgets(usable: Sequence[Curve], curves: Sequence[Curve]) -> list[Slice]:
    """Log-spaced budgets over the range where MIN_SIZES sizes are measured."""
    index = {id(curve): i for i, curve in enumerate(curves)}
    if num_sizes(usable) < MIN_SIZES:
        return []
    grid = np.geomspace(
        min(c.flops[0] for c in usable), max(c.flops[-1] for c in usable), 20 * NUM_INTERPOLATED
    )
    covered = [
        budget
        for budget in grid
        if num_distinct(c.params for c in usable if c.flops[0] <= budget <= c.flops[-1])
        >= MIN_SIZES
    ]
    if not covered:
        return []
    found = []
    for budget in np.geomspace(covered[0], covered[-1], NUM_INTERPOLATED):
        there = [c for c in usable if c.flops[0] <= budget <= c.flops[-1]]
        if num_distinct(c.params for c in there) < MIN_SIZES:
            continue
        x = np.log(budget)
        found.append(
            Slice(
                flops=float(budget),
                run=np.array([index[id(c)] for c in there]),
                params=np.array([c.params for c in there]),
                tokens=np.exp([np.interp(x, np.log(c.flops), np.log(c.tokens)) for c in there]),
                loss=np.exp([np.interp(x, np.log(c.flops), np.log(c.loss)) for c in there]),
                interpolated=True,
            )
        )
    return found


def minimum(budget: Slice, weights: Array, *, replicate: bool = False) -> Minimum:
    """The interior minimum of the parabola through one budget's runs.

    Raises:
        Refused: for too few sizes, curvature that is not positive, or a minimum at the rim.
    """
    weight = weights[budget.run]
    keep = weight > 0
    if budget.interpolated:
        keep &= _best_of_size(budget, keep)
    weight, params, loss = weight[keep], budget.params[keep], budget.loss[keep]
    sizes = num_distinct(params)
    needed = MIN_SIZES_REPLICATE if replicate else MIN_SIZES
    if sizes < needed:
        raise Refused(f"{sizes} sizes, {needed} are needed")
    x = np.log(params)
    centre, half = (x.max() + x.min()) / 2, (x.max() - x.min()) / 2
    z = (x - centre) / half
    c2, c1, c0 = np.polyfit(z, loss, 2, w=np.sqrt(weight))
    if not c2 > 0:
        raise Refused("the parabola bends downwards: negative curvature")
    vertex = -c1 / (2 * c2)
    if replicate and abs(vertex) > FAR:
        raise Refused("the minimum is far from every size")
    if not replicate:
        lowest = z[np.argmin(loss)]
        if not (-1 < vertex < 1 and abs(lowest) < 1):
            side = "smallest" if min(vertex, lowest) <= -1 else "largest"
            raise Refused(f"the lowest loss is at the {side} size: no interior minimum")
    log_tokens = np.polyfit(z, np.log(budget.tokens[keep]), 2, w=np.sqrt(weight))
    return Minimum(
        flops=budget.flops,
        params=float(np.exp(centre + half * vertex)),
        tokens=float(np.exp(np.polyval(log_tokens, vertex))),
        loss=float(c0 - c1**2 / (4 * c2)),
        curvature=float(2 * c2 / half**2),
        sizes=sizes,
    )


def _best_of_size(budget: Slice, keep: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Marks the lowest run of each size: between its ends, a longer run has yet to decay."""
    best = np.zeros(len(budget.params), dtype=bool)
    for params in np.unique(budget.params[keep]):
        same = np.flatnonzero(keep & (np.abs(np.log(budget.params / params)) < SAME))
        best[same[np.argmin(budget.loss[same])]] = True
    return best


def minima(
    budgets: Sequence[Slice], weights: Array, *, replicate: bool = False
) -> tuple[list[Minimum], list[tuple[float, str]]]:
    """The minimum of each budget that has one, and (budget, reason) of each that has none."""
    found, refused = [], []
    for budget in budgets:
        try:
            found.append(minimum(budget, weights, replicate=replicate))
        except Refused as reason:
            refused.append((budget.flops, str(reason)))
    return found, refused


def fit(budgets: Sequence[Slice], weights: Array, *, replicate: bool = False) -> dict[str, float]:
    """k_N, a, k_D and b over the budgets that have a minimum. Raises Refused."""
    found, refused = minima(budgets, weights, replicate=replicate)
    needed = 2 if replicate else MIN_BUDGETS
    if len(found) < needed:
        reasons = "; ".join(f"{flops:.3g} FLOPs: {reason}" for flops, reason in refused)
        raise Refused(f"{len(found)} budgets have a minimum, {needed} are needed ({reasons})")
    flops = np.array([m.flops for m in found])
    k_n, a = power_law(flops, np.array([m.params for m in found]))
    k_d, b = power_law(flops, np.array([m.tokens for m in found]))
    return {"k_N": k_n, "a": a, "k_D": k_d, "b": b}

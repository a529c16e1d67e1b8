"""What the three approaches share: learning curves, refusals, power laws, bootstrap over runs.

A fit is a pure function of an architecture's runs and one weight for each. All ones give the fit
itself; a bootstrap replicate draws runs with replacement and weighs each by how often it came.
Checkpoints of one run are never drawn one by one: they are not independent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tools.frontier.points import Point, by_run

Array = NDArray[np.float64]
MIN_SIZES = 5
MIN_SIZES_REPLICATE = 3  # a resample holds about two thirds of the runs
CONFIDENCE = 0.95
MIN_SUCCESS = 0.9  # of the replicates, for intervals to be given
SAME = 0.01  # relative difference below which two sizes or token counts are one


class Refused(Exception):
    """The data do not support this fit; the text says why."""


@dataclass(frozen=True)
class Curve:
    """The held-out measurements of one run, by rising FLOPs: arrays of [evaluations]."""

    run: str
    params: float
    tokens: Array
    flops: Array
    loss: Array


@dataclass(frozen=True)
class Bootstrap:
    """How intervals are made."""

    replicates: int = 400
    seed: int = 0


def curves_of(points: Iterable[Point]) -> list[Curve]:
    """One curve for each run, of its points with a positive cost and loss."""
    curves = []
    for (_, run), group in by_run(points).items():
        usable = [p for p in group if p.flops > 0 and p.tokens > 0 and p.loss > 0]
        if usable:
            curves.append(
                Curve(
                    run=run,
                    params=usable[-1].params,
                    tokens=np.array([p.tokens for p in usable], dtype=float),
                    flops=np.array([p.flops for p in usable], dtype=float),
                    loss=np.array([p.loss for p in usable], dtype=float),
                )
            )
    return curves


def num_distinct(values: Iterable[float]) -> int:
    """How many of the positive `values` differ by more than SAME."""
    logs = np.sort(np.log(np.fromiter(values, dtype=float)))
    return int(1 + np.sum(np.diff(logs) > np.log1p(SAME))) if len(logs) else 0


def num_sizes(curves: Sequence[Curve]) -> int:
    """How many model sizes there are."""
    return num_distinct(curve.params for curve in curves)


def require_sizes(found: int, needed: int = MIN_SIZES) -> None:
    """Raise Refused when there are fewer than `needed` sizes."""
    if found < needed:
        raise Refused(f"only {found} model size{'s' if found != 1 else ''}; {needed} are needed")


def power_law(x: Array, y: Array, weights: Array | None = None) -> tuple[float, float]:
    """(k, p) of y = k·x^p, by weighted least squares on the logarithms. Raises Refused."""
    log_x, log_y = np.log(x), np.log(y)
    weights = np.ones_like(log_x) if weights is None else weights
    mean_x, mean_y = np.average(log_x, weights=weights), np.average(log_y, weights=weights)
    spread = np.sum(weights * (log_x - mean_x) ** 2)
    if not spread > 0:
        raise Refused("all budgets are the same; a power law needs several")
    slope = np.sum(weights * (log_x - mean_x) * (log_y - mean_y)) / spread
    return float(np.exp(mean_y - slope * mean_x)), float(slope)


def intervals(
    fit: Callable[[Array], Mapping[str, float]], num_runs: int, bootstrap: Bootstrap
) -> tuple[dict[str, list[float]] | None, int]:
    """95 % percentile intervals of what `fit` returns, and how many replicates were refused.

    The intervals are None when more than a tenth of the replicates were refused.
    """
    rng = np.random.default_rng(bootstrap.seed)
    draws: list[Mapping[str, float]] = []
    for _ in range(bootstrap.replicates):
        weights = np.bincount(rng.integers(num_runs, size=num_runs), minlength=num_runs)
        try:
            draws.append(fit(weights.astype(float)))
        except Refused:
            continue
    failed = bootstrap.replicates - len(draws)
    if len(draws) < max(2, MIN_SUCCESS * bootstrap.replicates):
        return None, failed
    tail = (1 - CONFIDENCE) / 2
    return {
        name: [float(q) for q in np.quantile([draw[name] for draw in draws], [tail, 1 - tail])]
        for name in draws[0]
    }, failed

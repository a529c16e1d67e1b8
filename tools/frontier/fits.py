"""fit.json: what the points support, with intervals, and what they do not, with the reason."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tools.frontier import approach1, approach2, approach3
from tools.frontier.envelope import envelope
from tools.frontier.fitting import (
    CONFIDENCE,
    MIN_SUCCESS,
    Bootstrap,
    Curve,
    Refused,
    curves_of,
    intervals,
    num_sizes,
    require_sizes,
)
from tools.frontier.points import Point, by_arch

FORMAT = 1
APPROACHES = ("approach1", "approach2", "approach3")
METHODS = {
    "approach1": "lowest training curve at 1,500 log-spaced budgets, then power laws of C",
    "approach2": "a parabola in ln N at each isoFLOP budget, then power laws of C",
    "approach3": "L(N, D) = E + A/N^alpha + B/D^beta; sum of Huber(1e-3) of the log residual",
}
BEYOND = (1.0, 10.0, 100.0)  # budgets of the predictions, over the greatest one observed

Allocate = Callable[[float], tuple[float, float]]


@dataclass(frozen=True)
class Conventions:
    """What N, D, C and the loss mean in a table."""

    params: str
    tokens: str
    flops: str
    loss: str


def conventions(points: Sequence[Point], params_convention: str) -> Conventions:
    """The conventions of `points`; "unknown" where a foreign table does not say."""
    ours = all(point.flops_model_causal == point.flops for point in points)
    names = {
        "total": "total parameters, tied weights once",
        "non_embedding": "parameters without embeddings",
        "unknown": "unknown (give --params_convention)",
    }
    return Conventions(
        params=names[params_convention],
        tokens="tokens processed in training" if ours else "unknown (a foreign table's)",
        flops=(
            "model_causal: forward and backward of body and logits, causal attention halved"
            if ours
            else "unknown (a foreign table's)"
        ),
        loss="held-out nats per matched target token" if ours else "unknown (a foreign table's)",
    )


def fit_all(
    points: Sequence[Point],
    *,
    params_convention: str,
    eval_set: str,
    bootstrap: Bootstrap,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """The content of fit.json for the points of one evaluation set."""
    architectures = {}
    for arch, group in by_arch(points).items():
        progress(f"fitting {arch}")
        architectures[arch] = _architecture(curves_of(group), bootstrap)
    found = conventions(points, params_convention)
    return {
        "format": FORMAT,
        "eval_set": eval_set,
        "conventions": {
            "N": found.params,
            "D": found.tokens,
            "C": found.flops,
            "loss": found.loss,
        },
        "bootstrap": {
            "over": "runs",
            "replicates": bootstrap.replicates,
            "seed": bootstrap.seed,
            "interval": f"{CONFIDENCE:.0%} percentile",
        },
        "envelope": {
            "overall": _envelope(points),
            "architectures": {arch: _envelope(group) for arch, group in by_arch(points).items()},
        },
        "architectures": architectures,
    }


def _envelope(points: Sequence[Point]) -> list[dict[str, Any]]:
    return [
        {
            "arch": point.arch,
            "run": point.run,
            "step": point.step,
            "params": point.params,
            "tokens": point.tokens,
            "flops": point.flops,
            "loss": point.loss,
        }
        for point in envelope(points)
    ]


def _architecture(curves: Sequence[Curve], bootstrap: Bootstrap) -> dict[str, Any]:
    counts = {"runs": len(curves), "sizes": num_sizes(curves)}
    found: dict[str, Any] = dict(counts)
    if curves:
        found["observed"] = {
            "flops": [
                float(min(c.flops[0] for c in curves)),
                float(max(c.flops[-1] for c in curves)),
            ],
            "params": [float(min(c.params for c in curves)), float(max(c.params for c in curves))],
        }
    for name, fit in zip(APPROACHES, (_approach1, _approach2, _approach3), strict=True):
        try:
            if not curves:
                raise Refused("no evaluation after the first step")
            found[name] = {"method": METHODS[name], **fit(curves, bootstrap)}
        except Refused as reason:
            found[name] = {"method": METHODS[name], "refused": str(reason), **counts}
    return found


def _approach1(curves: Sequence[Curve], bootstrap: Bootstrap) -> dict[str, Any]:
    constants = approach1.fit(curves, np.ones(len(curves)))
    found = approach1.winners(curves)
    return {
        **_constants(constants, ("k_N", "k_D")),
        **_intervals(
            lambda weights: approach1.fit(curves, weights, replicate=True), len(curves), bootstrap
        ),
        "runs": len(curves),
        "sizes": num_sizes(curves),
        "fitted_flops": [float(found.flops.min()), float(found.flops.max())],
        "predictions": _predictions(
            lambda flops: approach1.allocation(constants, flops), curves, float(found.flops.max())
        ),
    }


def _approach2(curves: Sequence[Curve], bootstrap: Bootstrap) -> dict[str, Any]:
    require_sizes(num_sizes(curves))
    budgets = approach2.slices(curves)
    constants = approach2.fit(budgets, np.ones(len(curves)))
    found, refused = approach2.minima(budgets, np.ones(len(curves)))
    return {
        **_constants(constants, ("k_N", "k_D")),
        **_intervals(
            lambda weights: approach2.fit(budgets, weights, replicate=True), len(curves), bootstrap
        ),
        "runs": len(curves),
        "sizes": num_sizes(curves),
        "fitted_flops": [found[0].flops, found[-1].flops],
        "budgets": [
            {
                "flops": m.flops,
                "params": m.params,
                "tokens": m.tokens,
                "loss": m.loss,
                "curvature": m.curvature,
                "sizes": m.sizes,
            }
            for m in found
        ]
        + [{"flops": flops, "refused": reason} for flops, reason in refused],
        "interpolated": budgets[0].interpolated,
        "caveat": "k_N and k_D are biased when alpha != beta or sizes are wide or off-centre, even "
        "without noise (arXiv 2603.22339); a and b are not",
        "predictions": _predictions(
            lambda flops: approach1.allocation(constants, flops), curves, found[-1].flops
        ),
    }


def _approach3(curves: Sequence[Curve], bootstrap: Bootstrap) -> dict[str, Any]:
    approach3.require_identifiable(curves)
    constants = approach3.fit(*approach3.finals(curves), np.ones(len(curves)))
    excluded = approach3.outliers(constants, curves)
    if excluded:
        names = [curves[i].run for i in excluded]
        curves = [curve for i, curve in enumerate(curves) if i not in excluded]
        approach3.require_identifiable(curves)
        constants = approach3.fit(*approach3.finals(curves), np.ones(len(curves)))
    params, tokens, loss = approach3.finals(curves)
    least, typical, greatest = approach3.flops_factor(curves)
    budgets = [float(curve.flops[-1]) for curve in curves]
    residual = np.log(loss) - np.log(approach3.predict(constants, params, tokens))

    def allocate(flops: float) -> tuple[float, float]:
        return approach3.allocation(constants, flops, typical)

    return {
        **_constants(constants, ("E", "A", "B", "alpha", "beta")),
        **_intervals(
            lambda weights: approach3.fit(params, tokens, loss, weights, replicate=True),
            len(curves),
            bootstrap,
        ),
        "runs": len(curves),
        "sizes": num_sizes(curves),
        "fitted_flops": [min(budgets), max(budgets)],
        "outliers": names if excluded else [],
        "median_absolute_log_residual": float(np.median(np.abs(residual))),
        "flops_over_params_tokens": {"min": least, "typical": typical, "max": greatest},
        "caveat": "the allocation takes C = k*N*D with the typical k"
        + ("" if greatest < 1.25 * least else "; here k varies, so it is approximate"),
        "predictions": _predictions(allocate, curves, max(budgets), constants),
    }


def _constants(values: Mapping[str, float], names: Sequence[str]) -> dict[str, Any]:
    return {
        "constants": {name: values[name] for name in names},
        "exponents": {"a": values["a"], "b": values["b"]},
    }


def _intervals(
    fit: Callable[[Any], Mapping[str, float]], num_runs: int, bootstrap: Bootstrap
) -> dict[str, Any]:
    found, failed = intervals(fit, num_runs, bootstrap)
    result: dict[str, Any] = {"intervals": found, "replicates_refused": failed}
    if found is None:
        result["intervals_refused"] = (
            f"{failed} of {bootstrap.replicates} resamples of the runs could not be fitted "
            f"(at most {1 - MIN_SUCCESS:.0%} may); more runs are needed"
        )
    return result


def _predictions(
    allocate: Allocate,
    curves: Sequence[Curve],
    fitted: float,
    surface: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    """The optimum at the greatest observed budget and beyond.

    It is marked as extrapolated above the greatest `fitted` budget, and beyond the sizes observed.
    """
    greatest = max(float(c.flops[-1]) for c in curves)
    smallest_size = min(c.params for c in curves)
    largest_size = max(c.params for c in curves)
    rows = []
    for factor in BEYOND:
        params, tokens = allocate(greatest * factor)
        row: dict[str, Any] = {"flops": greatest * factor, "params": params, "tokens": tokens}
        if surface is not None:
            row["loss"] = float(approach3.predict(surface, np.array(params), np.array(tokens)))
        inside = greatest * factor <= fitted * 1.01 and smallest_size <= params <= largest_size
        row["extrapolated"] = not inside
        rows.append(row)
    return rows

"""Approach 3: the loss surface L(N, D) = E + A/N^α + B/D^β (Hoffmann et al. 2022, section 3.3).

The objective is theirs: the *sum* over runs of Huber(1e-3) of the log loss residual (a mean makes
L-BFGS stop early). The start is variable projection: for given α and β the surface is linear in E,
A and B, so a non-negative least squares inside a search over two numbers replaces a grid of starts
over five. L-BFGS then refines all five on the Huber objective.

The compute-optimal allocation, for C = k·N·D (k is 6 in the paper and measured here):
N_opt = G·(C/k)^a, D_opt = (C/k)^b / G, a = β/(α+β), b = α/(α+β), G = (αA/(βB))^(1/(α+β)).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from tools.frontier.fitting import (
    Array,
    Curve,
    Refused,
    num_distinct,
    num_sizes,
    require_sizes,
)

DELTA = 1e-3
MIN_RUNS = 10  # two for each constant
MIN_TOKEN_COUNTS = 3
MIN_TOKEN_SPREAD = 0.1  # standard deviation of ln D that ln N does not explain
EXPONENTS = (0.02, 3.0)  # beyond these an exponent is not identified by the data
OUTLIER_SPREADS, OUTLIER_FLOOR, OUTLIER_SHARE = 5.0, 0.02, 0.1
GRID = np.linspace(0.05, 1.5, 15)


def require_identifiable(curves: Sequence[Curve]) -> None:
    """Raise Refused unless the final evaluations can tell five constants apart."""
    require_sizes(num_sizes(curves))
    if len(curves) < MIN_RUNS:
        raise Refused(f"only {len(curves)} runs for five constants; {MIN_RUNS} are needed")
    tokens = num_distinct(curve.tokens[-1] for curve in curves)
    if tokens < MIN_TOKEN_COUNTS:
        raise Refused(
            f"D was not varied: {tokens} token count(s) among the final evaluations; "
            f"{MIN_TOKEN_COUNTS} are needed"
        )
    log_n = np.log([curve.params for curve in curves])
    log_d = np.log([curve.tokens[-1] for curve in curves])
    residual = log_d - np.polyval(np.polyfit(log_n, log_d, 1), log_n)
    if np.std(residual) < MIN_TOKEN_SPREAD:
        raise Refused(
            "D follows N in all runs, so that A/N^α and B/D^β cannot be told apart; "
            "train some sizes on several token counts"
        )


def finals(curves: Sequence[Curve]) -> tuple[Array, Array, Array]:
    """(N, D, loss) of each run's last evaluation: arrays of [runs]."""
    return (
        np.array([curve.params for curve in curves]),
        np.array([curve.tokens[-1] for curve in curves]),
        np.array([curve.loss[-1] for curve in curves]),
    )


def predict(constants: Mapping[str, float], params: Array, tokens: Array) -> Array:
    """The surface at (N, D)."""
    return (
        constants["E"]
        + constants["A"] / params ** constants["alpha"]
        + constants["B"] / tokens ** constants["beta"]
    )


def huber_sum(theta: Array, n: Array, d: Array, log_loss: Array, weights: Array) -> float:
    """The objective at theta = (ln A, ln B, ln E, α, β) for n = ln N and d = ln D."""
    return _objective(theta, n, d, log_loss, weights)[0] * DELTA**2


def _objective(
    theta: Array, n: Array, d: Array, log_loss: Array, weights: Array
) -> tuple[float, Array]:
    """The objective over δ² (so that stopping tolerances bite late) and its gradient."""
    ln_a, ln_b, ln_e, alpha, beta = theta
    terms = np.stack([ln_a - alpha * n, ln_b - beta * d, np.full_like(n, ln_e)])
    log_sum = np.logaddexp.reduce(terms, axis=0)
    share = np.exp(terms - log_sum)
    residual = log_sum - log_loss
    size = np.abs(residual)
    value = np.where(size <= DELTA, 0.5 * residual**2, DELTA * (size - 0.5 * DELTA))
    slope = weights * np.clip(residual, -DELTA, DELTA)
    gradient = np.array(
        [
            slope @ share[0],
            slope @ share[1],
            slope @ share[2],
            -slope @ (share[0] * n),
            -slope @ (share[1] * d),
        ]
    )
    return float(weights @ value) / DELTA**2, gradient / DELTA**2


def variable_projection(
    n: Array, d: Array, loss: Array, weights: Array, grid: Array = GRID
) -> Array:
    """(ln A, ln B, ln E, α, β) of least weighted squares of the relative residual.

    The search over (α, β) begins at the best pair of `grid`.
    """
    from scipy.optimize import minimize, nnls

    root = np.sqrt(weights)

    def inner(exponents: Array) -> tuple[Array, float]:
        columns = [np.exp(-exponents[0] * n), np.exp(-exponents[1] * d), np.ones_like(n)]
        coefficients, residual = nnls(np.stack(columns, axis=1) * (root / loss)[:, None], root)
        return coefficients, float(residual)

    starts = [np.array([alpha, beta]) for alpha in grid for beta in grid]
    start = min(starts, key=lambda exponents: inner(exponents)[1])
    found = minimize(
        lambda exponents: inner(exponents)[1] ** 2,
        start,
        method="Nelder-Mead",
        bounds=[(0.0, 2 * EXPONENTS[1])] * 2,
        options={"xatol": 1e-4, "fatol": 1e-14, "maxiter": 200},
    ).x
    return np.array([*np.log(np.maximum(inner(found)[0], 1e-12)), *found])


def fit(
    params: Array, tokens: Array, loss: Array, weights: Array, *, replicate: bool = False
) -> dict[str, float]:
    """E, A, B, alpha, beta, and a and b, over the runs of positive weight.

    Raises:
        Refused: when a term is not identified.
    """
    from scipy.optimize import minimize

    keep = weights > 0
    if num_distinct(params[keep]) < 3 or num_distinct(tokens[keep]) < 3 or keep.sum() <= 5:
        raise Refused("too few different runs for five constants")
    log_n, log_d = np.log(params[keep]), np.log(tokens[keep])
    # Centred logarithms: otherwise ln A and α (ln B and β) are nearly one direction.
    centre_n, centre_d = float(log_n.mean()), float(log_d.mean())
    n, d, log_loss = log_n - centre_n, log_d - centre_d, np.log(loss[keep])
    theta = minimize(
        _objective,
        variable_projection(n, d, loss[keep], weights[keep], GRID[::3] if replicate else GRID),
        args=(n, d, log_loss, weights[keep]),
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": 5000, "maxfun": 20000, "ftol": 1e-15, "gtol": 1e-9, "maxcor": 20},
    ).x
    ln_a, ln_b, ln_e, alpha, beta = (float(value) for value in theta)
    for name, exponent, term in (("alpha", alpha, ln_a), ("beta", beta, ln_b)):
        if not EXPONENTS[0] < exponent < EXPONENTS[1] or term < ln_e - np.log(1e6):
            of = "N" if name == "alpha" else "D"
            raise Refused(f"{name}={exponent:.3g}: the dependence on {of} is not identified")
    return {
        "E": float(np.exp(ln_e)),
        "A": float(np.exp(ln_a + alpha * centre_n)),
        "B": float(np.exp(ln_b + beta * centre_d)),
        "alpha": alpha,
        "beta": beta,
        "a": beta / (alpha + beta),
        "b": alpha / (alpha + beta),
    }


def outliers(constants: Mapping[str, float], curves: Sequence[Curve]) -> list[int]:
    """Runs far from the surface, by index: beyond five robust spreads and two per cent.

    More than a tenth of the runs are no outliers but a surface of another shape: none is named.
    """
    params, tokens, loss = finals(curves)
    residual = np.log(loss) - np.log(predict(constants, params, tokens))
    spread = 1.4826 * np.median(np.abs(residual - np.median(residual)))
    far = np.flatnonzero(np.abs(residual) > max(OUTLIER_SPREADS * spread, OUTLIER_FLOOR))
    return [int(i) for i in far] if len(far) <= OUTLIER_SHARE * len(curves) else []


def flops_factor(curves: Sequence[Curve]) -> tuple[float, float, float]:
    """(least, typical, greatest) k of C = k·N·D over the runs' final evaluations."""
    k = np.array([c.flops[-1] / (c.params * c.tokens[-1]) for c in curves])
    return float(k.min()), float(np.exp(np.mean(np.log(k)))), float(k.max())


def allocation(constants: Mapping[str, float], flops: float, k: float) -> tuple[float, float]:
    """(N_opt, D_opt) at a budget of `flops` when C = k·N·D."""
    alpha, beta = constants["alpha"], constants["beta"]
    g = (alpha * constants["A"] / (beta * constants["B"])) ** (1 / (alpha + beta))
    product = flops / k
    return g * product ** constants["a"], product ** constants["b"] / g

"""The three approaches: known surfaces recovered, refusals, intervals."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy.optimize import minimize

from tools.frontier import approach1, approach2, approach3, fits
from tools.frontier.fitting import Bootstrap, Curve, Refused, intervals, power_law
from tools.frontier.points import Point

TRUE = {"E": 1.69, "A": 406.4, "B": 410.7, "alpha": 0.34, "beta": 0.28}
A_TRUE = TRUE["beta"] / (TRUE["alpha"] + TRUE["beta"])
G = (TRUE["alpha"] * TRUE["A"] / (TRUE["beta"] * TRUE["B"])) ** (1 / (TRUE["alpha"] + TRUE["beta"]))


def surface(params, tokens, true=TRUE):
    return true["E"] + true["A"] / params ** true["alpha"] + true["B"] / tokens ** true["beta"]


def final(run, params, tokens, loss, flops=None):
    flops = 6 * params * tokens if flops is None else flops
    return Curve(run, params, np.array([tokens]), np.array([flops]), np.array([loss]))


def grid(num_sizes=6, num_tokens=5, noise=0.0, seed=0, true=TRUE):
    rng = np.random.default_rng(seed)
    return [
        final(f"{n:.3g}-{d:.3g}", n, d, surface(n, d, true) * np.exp(noise * rng.standard_normal()))
        for n, d in itertools.product(
            np.geomspace(1e7, 1e10, num_sizes), np.geomspace(3e8, 1e11, num_tokens)
        )
    ]


def isoflop(budgets=(1e18, 1e19, 1e20, 1e21), sizes=7, width=6.0, true=TRUE, noise=0.0, seed=0):
    """Runs at exact budgets, sizes centred on the true optimum."""
    rng = np.random.default_rng(seed)
    a = true["beta"] / (true["alpha"] + true["beta"])
    g = (true["alpha"] * true["A"] / (true["beta"] * true["B"])) ** (
        1 / (true["alpha"] + true["beta"])
    )
    curves = []
    for budget in budgets:
        for factor in np.geomspace(1 / width, width, sizes):
            params = g * (budget / 6) ** a * factor
            tokens = budget / 6 / params
            loss = surface(params, tokens, true) * np.exp(noise * rng.standard_normal())
            curves.append(final(f"{budget:g} {factor:g}", params, tokens, loss))
    return curves


def training_curves(num_sizes=40, noise=0.0, seed=0, points=60):
    rng = np.random.default_rng(seed)
    curves = []
    for params in np.geomspace(1e7, 1e10, num_sizes):
        tokens = np.geomspace(1e8, 1e12, points)
        loss = surface(params, tokens) * np.exp(noise * rng.standard_normal())
        curves.append(Curve(f"{params:g}", params, tokens, 6 * params * tokens, loss))
    return curves


def ones(curves):
    return np.ones(len(curves))


def fit3(curves, weights=None):
    return approach3.fit(*approach3.finals(curves), ones(curves) if weights is None else weights)


# The power law below all of them.


def test_a_power_law_is_recovered_and_weights_select():
    x = np.geomspace(1e3, 1e9, 9)
    y = 0.3 * x**0.47
    assert power_law(x, y) == pytest.approx((0.3, 0.47), rel=1e-10)
    y[4] *= 100
    weights = np.ones(9)
    weights[4] = 0
    assert power_law(x, y, weights) == pytest.approx((0.3, 0.47), rel=1e-10)


# Approach 3.


@pytest.mark.parametrize(
    "true",
    [
        TRUE,
        {"E": 0.5, "A": 20.0, "B": 3000.0, "alpha": 0.2, "beta": 0.45},
        {"E": 2.5, "A": 5000.0, "B": 100.0, "alpha": 0.6, "beta": 0.25},
    ],
)
def test_approach3_recovers_noise_free_constants(true):
    found = fit3(grid(true=true))
    assert {name: found[name] for name in true} == pytest.approx(true, rel=1e-5)
    assert found["a"] == pytest.approx(true["beta"] / (true["alpha"] + true["beta"]), rel=1e-6)
    assert found["a"] + found["b"] == pytest.approx(1)


@pytest.mark.parametrize("noise", [0.003, 0.02])
def test_approach3_is_no_worse_than_a_grid_of_lbfgs_starts(noise):
    curves = grid(noise=noise, seed=5)
    params, tokens, loss = approach3.finals(curves)
    n, d, log_loss = np.log(params), np.log(tokens), np.log(loss)

    def objective(theta):  # written from the paper, not from the code under test
        a, b, e, alpha, beta = theta
        predicted = np.logaddexp(np.logaddexp(a - alpha * n, b - beta * d), e)
        residual = np.abs(predicted - log_loss)
        huber = np.where(residual < 1e-3, residual**2 / 2, 1e-3 * (residual - 5e-4))
        return 1e6 * huber.sum()

    starts = itertools.product((0, 10), (0, 10), (0, 1), (0.2, 0.8), (0.2, 0.8))
    best = min(
        minimize(objective, s, method="L-BFGS-B", options={"maxiter": 400}).fun for s in starts
    )
    found = fit3(curves)
    theta = [np.log(found[name]) for name in "ABE"] + [found["alpha"], found["beta"]]
    ours = objective(theta)
    assert ours <= best * (1 + 1e-4)
    assert 1e6 * approach3.huber_sum(np.array(theta), n, d, log_loss, np.ones(len(n))) == (
        pytest.approx(ours, rel=1e-6)
    )


def test_approach3_gradient_is_the_objective_s():
    curves = grid(noise=0.01)
    params, tokens, loss = approach3.finals(curves)
    arguments = (np.log(params), np.log(tokens), np.log(loss), ones(curves))
    theta = np.array([5.0, 6.0, 0.4, 0.31, 0.29])
    gradient = approach3._objective(theta, *arguments)[1]
    for i in range(5):
        step = np.zeros(5)
        step[i] = 1e-6
        rise = (
            approach3._objective(theta + step, *arguments)[0]
            - approach3._objective(theta - step, *arguments)[0]
        )
        assert gradient[i] == pytest.approx(rise / 2e-6, rel=1e-4)


def test_weights_of_runs_are_repetitions_of_runs():
    curves = grid(noise=0.01, num_tokens=4)
    weights = np.ones(len(curves))
    weights[3], weights[7] = 3, 0
    repeated = [curve for curve, w in zip(curves, weights, strict=True) for _ in range(int(w))]
    assert fit3(curves, weights) == pytest.approx(fit3(repeated), rel=1e-3)


def test_the_allocation_is_the_best_split_of_the_budget():
    params, tokens = approach3.allocation({**TRUE, "a": A_TRUE, "b": 1 - A_TRUE}, 1e21, 6.0)
    assert 6 * params * tokens == pytest.approx(1e21)
    candidates = params * np.geomspace(0.5, 2, 2001)
    losses = surface(candidates, 1e21 / 6 / candidates)
    assert candidates[np.argmin(losses)] == pytest.approx(params, rel=1e-3)
    assert params == pytest.approx(G * (1e21 / 6) ** A_TRUE)


def test_intervals_cover_the_truth_and_shrink_without_noise():
    covered = 0
    for seed in range(8):
        params, tokens, loss = approach3.finals(grid(noise=0.005, seed=seed))
        found, _ = intervals(
            lambda w, n=params, d=tokens, y=loss: approach3.fit(n, d, y, w, replicate=True),
            len(params),
            Bootstrap(60, seed),
        )
        low, high = found["a"]
        covered += low <= A_TRUE <= high
        assert 0.005 < high - low < 0.2
    assert covered >= 6


def test_an_outlier_is_named_left_out_and_no_longer_moves_beta():
    curves = grid(noise=0.002)
    bad = curves[4]
    curves[4] = final("bad", bad.params, bad.tokens[0], bad.loss[0] * 1.5)
    found = fits._approach3(curves, Bootstrap(10))
    assert found["outliers"] == ["bad"]
    assert found["runs"] == len(curves) - 1
    assert found["constants"]["beta"] == pytest.approx(0.28, abs=0.02)


@pytest.mark.parametrize(
    ("curves", "reason"),
    [
        (grid(num_sizes=4), "only 4 model sizes; 5 are needed"),
        (grid(num_sizes=9, num_tokens=1), "only 9 runs"),
        (grid(num_sizes=12, num_tokens=1), "D was not varied"),
        (
            [final(str(n), n, 20 * n, surface(n, 20 * n)) for n in np.geomspace(1e7, 1e10, 12)],
            "D follows N",
        ),
        (
            [final(c.run, c.params, c.tokens[0], 3 + 1e3 / c.tokens[0] ** 0.4) for c in grid()],
            "dependence on N is not identified",
        ),
    ],
)
def test_approach3_refuses(curves, reason):
    with pytest.raises(Refused, match=reason):
        fits._approach3(curves, Bootstrap(10))


# Approach 2.


def test_approach2_recovers_a_parabola_exactly():
    curves = []
    for budget in np.geomspace(1e18, 1e21, 5):
        best = 0.1 * budget**0.52
        for factor in np.geomspace(0.2, 4, 6):
            params = best * factor
            loss = 2.0 + 3e5 * budget**-0.3 + 0.05 * np.log(factor) ** 2
            curves.append(final(f"{budget} {factor}", params, budget / 6 / params, loss))
    budgets = approach2.slices(curves)
    assert len(budgets) == 5
    assert not budgets[0].interpolated
    found = approach2.fit(budgets, ones(curves))
    assert found["k_N"] == pytest.approx(0.1, rel=1e-6)
    assert found["a"] == pytest.approx(0.52, rel=1e-8)
    assert found["b"] == pytest.approx(0.48, rel=1e-8)
    assert found["k_D"] == pytest.approx(1 / 0.6, rel=1e-6)
    assert approach2.minimum(budgets[0], ones(curves)).curvature == pytest.approx(0.1)


def test_approach2_slope_is_right_on_a_surface():
    curves = isoflop()
    found = approach2.fit(approach2.slices(curves), ones(curves))
    assert found["a"] == pytest.approx(A_TRUE, abs=1e-3)


def test_approach2_interpolates_training_curves():
    curves = training_curves(num_sizes=15)
    budgets = approach2.slices(curves)
    assert budgets[0].interpolated
    found = approach2.fit(budgets, ones(curves))
    assert found["a"] == pytest.approx(A_TRUE, abs=0.03)


def test_approach2_interval_covers_the_truth():
    covered = 0
    for seed in range(20):
        curves = isoflop(noise=0.004, seed=seed)
        budgets = approach2.slices(curves)
        found, _ = intervals(
            lambda w, b=budgets: approach2.fit(b, w, replicate=True),
            len(curves),
            Bootstrap(60, seed),
        )
        covered += found["a"][0] <= A_TRUE <= found["a"][1]
    assert covered >= 17


def slope_only(sign, curvature=0.0):
    """Budgets whose loss rises (1) or falls (-1) with size, or bends by `curvature`."""
    return [
        final(
            f"{c} {z}", 1e8 * np.exp(z), c / 6e8 / np.exp(z), 3 + 0.1 * sign * z + curvature * z * z
        )
        for c in (1e18, 1e19, 1e20)
        for z in (-1.0, -0.5, 0.0, 0.5, 1.0)
    ]


@pytest.mark.parametrize(
    ("curves", "reason"),
    [
        (slope_only(1, 0.01), "smallest size: no interior minimum"),
        (slope_only(-1, 0.01), "largest size: no interior minimum"),
        (slope_only(0, -0.05), "negative curvature"),
        (isoflop(sizes=4), "fewer than 3 budgets"),
        (isoflop(budgets=(1e18, 1e20)), "fewer than 3 budgets"),
        (grid(num_sizes=3), "only 3 model sizes"),
    ],
)
def test_approach2_refuses(curves, reason):
    with pytest.raises(Refused, match=reason):
        fits._approach2(curves, Bootstrap(10))


def test_a_budget_without_minimum_is_listed_beside_the_fit():
    spoilt = [
        final(c.run, c.params, c.tokens[0], 3 + 0.1 * np.log(c.params), c.flops[0])
        if c.flops[0] > 9e20
        else c
        for c in isoflop()
    ]
    found = fits._approach2(spoilt, Bootstrap(10))
    assert [("refused" in b) for b in found["budgets"]] == [False, False, False, True]
    assert found["budgets"][-1]["flops"] == pytest.approx(1e21)


# Approach 1.


def test_approach1_recovers_the_exponents():
    curves = training_curves()
    found = approach1.fit(curves, ones(curves))
    assert found["a"] == pytest.approx(A_TRUE, abs=0.01)
    assert found["b"] == pytest.approx(1 - A_TRUE, abs=0.01)
    assert approach1.allocation(found, 1e19)[0] == pytest.approx(G * (1e19 / 6) ** A_TRUE, rel=0.1)


def test_approach1_winners_are_the_lowest_curves():
    curves = training_curves(num_sizes=9)
    found = approach1.winners(curves)
    for flops, params in list(zip(found.flops, found.params, strict=True))[::100]:
        there = [c for c in curves if c.flops[0] <= flops <= c.flops[-1]]
        losses = [surface(c.params, flops / 6 / c.params) for c in there]
        assert surface(params, flops / 6 / params) <= min(losses) * (1 + 1e-3)
        assert min(c.params for c in there) < params < max(c.params for c in there)


@pytest.mark.parametrize(
    ("curves", "reason"),
    [
        (training_curves(num_sizes=4), "only 4 model sizes"),
        (grid(), "no run has more than one evaluation"),
        (
            [
                Curve(str(n), n, c.tokens, c.flops, 2 + n / 1e10 + 1e3 / c.flops**0.2)
                for c in training_curves(num_sizes=6, points=9)
                for n in [c.params]
            ],
            "no interior minimum|ever the best",
        ),
    ],
)
def test_approach1_refuses(curves, reason):
    with pytest.raises(Refused, match=reason):
        fits._approach1(curves, Bootstrap(10))


# Bootstrap and fit.json.


def test_bootstrap_draws_runs_and_repeats_by_seed():
    drawn = []

    def fit(weights):
        drawn.append(weights)
        return {"mean": float(weights @ np.arange(7) / weights.sum())}

    first, _ = intervals(fit, 7, Bootstrap(50, seed=1))
    assert all(w.sum() == 7 and len(w) == 7 for w in drawn)
    assert intervals(fit, 7, Bootstrap(50, seed=1))[0] == first
    assert intervals(fit, 7, Bootstrap(50, seed=2))[0] != first
    assert first["mean"][0] < 3 < first["mean"][1]


def test_intervals_are_withheld_when_resamples_cannot_be_fitted():
    def fit(weights):
        if weights[0] == 0:
            raise Refused("no first run")
        return {"x": 1.0}

    found, failed = intervals(fit, 5, Bootstrap(100))
    assert found is None
    assert 15 < failed < 55


def test_checkpoints_do_not_narrow_the_intervals():
    def arch_fit(every):
        points = [
            Point("d", c.params, t, f, loss, run=c.run, step=i)
            for c in training_curves(num_sizes=12, noise=0.004, points=41)
            for i, (t, f, loss) in enumerate(zip(c.tokens, c.flops, c.loss, strict=True))
            if i % every == 0
        ]
        fit = fits.fit_all(
            points, params_convention="unknown", eval_set="v", bootstrap=Bootstrap(60)
        )
        low, high = fit["architectures"]["d"]["approach1"]["intervals"]["a"]
        return high - low

    assert arch_fit(1) > 0.5 * arch_fit(4)


def test_fit_json_says_what_is_extrapolated_and_by_which_conventions():
    points = [
        Point("d", c.params, c.tokens[0], c.flops[0], c.loss[0], run=c.run)
        for c in grid(noise=0.003)
    ]
    fit = fits.fit_all(points, params_convention="unknown", eval_set="v", bootstrap=Bootstrap(20))
    found = fit["architectures"]["d"]["approach3"]
    assert set(found["constants"]) == set(TRUE)
    assert set(found["intervals"]) == {*TRUE, "a", "b"}
    assert found["runs"] == 30
    assert found["flops_over_params_tokens"]["typical"] == pytest.approx(6)
    greatest = max(p.flops for p in points)
    for row in found["predictions"]:
        if row["flops"] > greatest * 1.001:
            assert row["extrapolated"]
        assert row["loss"] == pytest.approx(surface(row["params"], row["tokens"]), rel=0.05)
    assert fit["conventions"]["N"].startswith("unknown")
    assert fit["bootstrap"]["over"] == "runs"
    assert "refused" in fit["architectures"]["d"]["approach1"]


def test_a_budget_or_a_size_beyond_the_fitted_is_extrapolated():
    curves = grid()
    greatest = max(c.flops[-1] for c in curves)

    def marks(params, fitted):
        rows = fits._predictions(lambda flops: (params, 1e10), curves, fitted)
        return [row["extrapolated"] for row in rows]

    assert marks(1e8, greatest) == [False, True, True]
    assert marks(1e8, greatest / 2) == [True, True, True]
    assert marks(1e11, greatest) == [True, True, True]

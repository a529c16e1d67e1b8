"""Our single-process Adafactor and optax's agree in fp64."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.pipeline.optim.plain_adafactor import PlainAdafactor, Rule, every_rule

# JAX takes ten seconds to start, in a process of its own.
pytestmark = pytest.mark.distributed
SHAPES = [(12, 9), (9, 12), (5,), (3, 12, 9), (12, 3, 9), (1, 20), (10, 10, 10)]
RULES = {
    # Every choice with every other one.
    **{str(index): rule for index, rule in enumerate(every_rule(min_dim_size_to_factor=9))},
    "slower_decay": Rule(factored=True, min_dim_size_to_factor=9, decay_rate=0.6),
    "clipping_2": Rule(beta1=0.5, clipping_threshold=2.0),
}
WITH_ALL = Rule(factored=True, min_dim_size_to_factor=9, beta1=0.9, weight_decay=0.3)
STEPS, LR = 8, 0.02
# optax in a process of its own: JAX starts threads, and its 64-bit switch is a global one. It
# computes the decay of the second moment in fp32 whatever the parameters are in, which alone would
# show at 3e-8; here in fp64, by the same formula.
OPTAX = """
import functools, json, sys
import jax
jax.config.update("jax_enable_x64", True)
import numpy as np, optax
from optax._src import factorized
factorized.scale_by_factored_rms = functools.partial(
    factorized.scale_by_factored_rms,
    decay_rate_fn=lambda i, exponent: 1 - (np.float64(1) + i) ** -exponent,
)
folder, rules, lr = sys.argv[1], json.loads(sys.argv[2]), float(sys.argv[3])
given = np.load(f"{folder}/given.npz")
count = len({name.split("_")[1] for name in given if name.startswith("p_")})
steps = len([name for name in given if name.startswith("g_0_")])
for name, rule in rules.items():
    optimizer = optax.adafactor(
        lr,
        min_dim_size_to_factor=rule["min_dim_size_to_factor"],
        decay_rate=rule["decay_rate"],
        multiply_by_parameter_scale=rule["multiply_by_parameter_scale"],
        clipping_threshold=rule["clipping_threshold"],
        momentum=rule["beta1"] or None,
        dtype_momentum=np.float64,
        weight_decay_rate=lr * rule["weight_decay"] or None,
        eps=rule["epsilon1"],
        factored=rule["factored"],
    )
    params = [given[f"p_{i}"] for i in range(count)]
    state = optimizer.init(params)
    for step in range(steps):
        grads = [given[f"g_{i}_{step}"] for i in range(count)]
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    np.savez(f"{folder}/{name}.npz", *params)
"""


@pytest.fixture(scope="module")
def from_optax(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the given parameters and gradients, and optax's results by rule."""
    folder = tmp_path_factory.mktemp("optax")
    rng = np.random.default_rng(0)
    given = {}
    for i, shape in enumerate(SHAPES):
        # Sizes from far below the smallest scale to far above it.
        given[f"p_{i}"] = rng.normal(size=shape) * 10.0 ** (i - 4)
        for step in range(STEPS):
            given[f"g_{i}_{step}"] = rng.normal(size=shape) * 10.0 ** rng.uniform(-3, 1, shape)
    given["g_2_3"] *= 0
    np.savez(folder / "given.npz", **given)
    rules = json.dumps({name: asdict(rule) for name, rule in RULES.items()})
    done = subprocess.run(
        [sys.executable, "-c", OPTAX, str(folder), rules, str(LR)],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    return folder


def ours(folder: Path, rule: Rule) -> list[torch.Tensor]:
    given = np.load(folder / "given.npz")
    params = [torch.from_numpy(given[f"p_{i}"].copy()) for i in range(len(SHAPES))]
    optimizer = PlainAdafactor(params, rule)
    for step in range(STEPS):
        gradients = [torch.from_numpy(given[f"g_{i}_{step}"]) for i in range(len(SHAPES))]
        optimizer.step(LR, gradients)
    return params


def furthest(found: list[torch.Tensor], folder: Path, name: str) -> float:
    """The largest difference over all parameters, relative to the parameter's largest value."""
    expected = np.load(folder / f"{name}.npz")
    return max(
        float((a - torch.from_numpy(b)).abs().max() / abs(b).max())
        for a, b in zip(found, expected.values(), strict=True)
    )


@pytest.mark.parametrize("name", RULES)
def test_the_reference_is_optax_in_fp64(name: str, from_optax: Path) -> None:
    assert furthest(ours(from_optax, RULES[name]), from_optax, name) < 1e-10


@pytest.mark.parametrize(
    "change",
    [
        {"epsilon2": 2e-3},
        {"decay_rate": 0.79},
        {"factored": False},
        {"beta1": 0.89},
        {"weight_decay": 0.29},
        {"clipping_threshold": 1.01},
    ],
)
def test_every_part_of_the_rule_shows(change: dict[str, float], from_optax: Path) -> None:
    (name,) = (name for name, rule in RULES.items() if rule == WITH_ALL)
    assert furthest(ours(from_optax, replace(WITH_ALL, **change)), from_optax, name) > 1e-6

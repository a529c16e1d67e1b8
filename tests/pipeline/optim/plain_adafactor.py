"""Adafactor in one process, one whole parameter at a time: what the sharded one is compared with.

Written from the papers' formulas (arXiv 1804.04235, algorithms 4 and 5, with T5X's names) and kept
plain: no flat tensors, no collectives, none of the package's code. Itself compared with optax.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch


@dataclass(frozen=True)
class Rule:
    """The hyper-parameters that stay the same over a run."""

    factored: bool = False
    decay_rate: float = 0.8
    clipping_threshold: float | None = 1.0
    multiply_by_parameter_scale: bool = True
    beta1: float = 0.0
    weight_decay: float = 0.0
    min_dim_size_to_factor: int = 128
    epsilon1: float = 1e-30
    epsilon2: float = 1e-3


def every_rule(**changes: Any) -> Iterator[Rule]:
    """Factored or not, with and without each of momentum, decay, clipping and scaling."""
    for factored, beta1, decay, clipping, scaled in product(
        (False, True), (0.0, 0.9), (0.0, 0.3), (1.0, None), (True, False)
    ):
        yield Rule(
            factored=factored,
            beta1=beta1,
            weight_decay=decay,
            clipping_threshold=clipping,
            multiply_by_parameter_scale=scaled,
            **changes,
        )


def rms(x: torch.Tensor) -> torch.Tensor:
    return x.square().mean().sqrt()


def two_largest(shape: Iterable[int], minimum: int) -> tuple[int, int] | None:
    """The places of the second largest and the largest dimension; None where one is too small."""
    sizes = list(shape)
    if len(sizes) < 2:
        return None
    order = sorted(range(len(sizes)), key=lambda place: sizes[place])
    second, first = order[-2], order[-1]
    return (second, first) if sizes[second] >= minimum else None


def step_one(
    p: torch.Tensor, g: torch.Tensor, state: dict[str, Any], lr: float, rule: Rule
) -> None:
    """One step of one parameter, in place; `state` is empty before the first."""
    t = state["t"] = state.get("t", 0) + 1
    beta2 = 1 - t**-rule.decay_rate
    squares = g * g + rule.epsilon1
    dims = two_largest(p.shape, rule.min_dim_size_to_factor) if rule.factored else None
    if dims is None:
        state["v"] = beta2 * state.get("v", torch.zeros_like(p)) + (1 - beta2) * squares
        u = g / state["v"].sqrt()
    else:
        second, first = dims
        for key, gone in (("r", first), ("c", second)):
            mean = squares.mean(gone, keepdim=True)
            state[key] = beta2 * state.get(key, torch.zeros_like(mean)) + (1 - beta2) * mean
        u = g / (state["r"] / state["r"].mean(second, keepdim=True)).sqrt() / state["c"].sqrt()
    if rule.clipping_threshold is not None:
        u = u / max(1.0, float(rms(u)) / rule.clipping_threshold)
    size = lr
    if rule.multiply_by_parameter_scale:
        size *= max(float(rms(p)), rule.epsilon2)
    u = size * u
    if rule.beta1:
        state["m"] = rule.beta1 * state.get("m", torch.zeros_like(p)) + (1 - rule.beta1) * u
        u = state["m"]
    p.copy_((1 - lr * rule.weight_decay) * p - u)


class PlainAdafactor:
    """The rule over a list of parameters; matrices alone decay."""

    def __init__(self, parameters: Iterable[torch.Tensor], rule: Rule) -> None:
        self.parameters = list(parameters)
        self.rule = rule
        self.states: list[dict[str, Any]] = [{} for _ in self.parameters]

    @torch.no_grad()
    def step(self, lr: float, gradients: Iterable[torch.Tensor] | None = None) -> None:
        """One step, from the given gradients or those of the parameters."""
        if gradients is None:
            gradients = [p.grad for p in self.parameters if p.grad is not None]
        for p, g, state in zip(self.parameters, gradients, self.states, strict=True):
            step_one(p, g, state, lr, self.rule)

"""Optimizers over whole parameters in one process, behind what `parity.plain` asks of one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from tests.distributed.parity import Case
from tests.pipeline.optim.plain_adafactor import PlainAdafactor, Rule


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """The run's AdamW, over whole parameters."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95))


class Together(torch.optim.Optimizer):
    """Several optimizers as one."""

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        self.parts = parts
        self.param_groups = [group for part in parts for group in part.param_groups]

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for part in self.parts:
            part.step()


class Plain(torch.optim.Optimizer):
    """The plain Adafactor over one group of parameters."""

    def __init__(self, parameters: list[nn.Parameter], rule: Rule) -> None:
        super().__init__(parameters, {"lr": 0.0})
        self._plain = PlainAdafactor(parameters, rule)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self._plain.step(self.param_groups[0]["lr"])


def adafactor(model: nn.Module, rule: Rule) -> torch.optim.Optimizer:
    """Adafactor; matrices alone decay."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    return Together(Plain(matrices, rule), Plain(vectors, replace(rule, weight_decay=0.0)))


class PlainMuon(torch.optim.Optimizer):
    """Muon as its author describes it (kellerjordan.github.io/posts/muon), in fp32."""

    def __init__(self, parameters: list[nn.Parameter], weight_decay: float) -> None:
        super().__init__(parameters, {"lr": 0.0})
        self._decay = weight_decay

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        lr = self.param_groups[0]["lr"]
        for p in self.param_groups[0]["params"]:
            m = self.state[p].setdefault("m", torch.zeros_like(p))
            m.copy_(0.95 * m + 0.05 * p.grad)
            update = orthogonal(0.05 * p.grad + 0.95 * m)
            rows, columns = p.shape
            p.copy_((1 - lr * self._decay) * p - lr * max(1, rows / columns) ** 0.5 * update)


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """Five steps of the quintic Newton-Schulz iteration."""
    x = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x if matrix.shape[0] <= matrix.shape[1] else x.T


def muon(model: nn.Module, kind: str, adam_scale: float) -> torch.optim.Optimizer:
    """Muon for the matrices of the blocks, AdamW for the rest; `kind` plain or torch."""
    hidden = [p for n, p in model.named_parameters() if p.dim() == 2 and "embedding" not in n]
    embeddings = [p for n, p in model.named_parameters() if p.dim() == 2 and "embedding" in n]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    adam = torch.optim.AdamW(
        [
            {"params": embeddings, "weight_decay": 0.1, "lr_scale": adam_scale},
            {"params": vectors, "weight_decay": 0.0, "lr_scale": adam_scale},
        ],
        betas=(0.9, 0.95),
    )
    if kind == "torch":
        return Together(torch.optim.Muon(hidden, weight_decay=0.1, momentum=0.95), adam)
    return Together(PlainMuon(hidden, 0.1), adam)


@dataclass(frozen=True)
class Recipe:
    """One way to step.

    Attributes:
        run: what the run says.
        make: the same over whole parameters.
    """

    optimizer: str
    run: tuple[tuple[str, Any], ...]
    make: Callable[[nn.Module], torch.optim.Optimizer]

    def case(self, arch: str, stage: int = 3, **changes: Any) -> Case:
        """A case that steps so."""
        return Case(arch, stage, self.optimizer, run=self.run, **changes)


DECAY: tuple[tuple[str, Any], ...] = (("weight_decay", 0.1),)
FACTORED = (("factored", True), ("min_dim_size_to_factor", 32), ("beta1", 0.5), *DECAY)
# Muon's auxiliary AdamW at half the peak.
SLOW_ADAM: tuple[tuple[str, Any], ...] = (("adam_lr", 0.005),)
WHOLE_RULE = Rule(weight_decay=0.1)
FACTORED_RULE = replace(WHOLE_RULE, factored=True, min_dim_size_to_factor=32, beta1=0.5)
RECIPES = {
    "adamw": Recipe("adamw", (), adamw),
    "adafactor": Recipe("adafactor", DECAY, lambda model: adafactor(model, WHOLE_RULE)),
    "factored": Recipe("adafactor", FACTORED, lambda model: adafactor(model, FACTORED_RULE)),
    "muon": Recipe("muon", SLOW_ADAM, lambda model: muon(model, "plain", 0.5)),
}

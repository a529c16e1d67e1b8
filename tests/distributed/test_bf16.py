"""bf16 with fp32 masters under ZeRO-3 on 2 ranks: the numbers of one process in bf16."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest

from tests.distributed.parity import Case, Curve, largest_difference, losses, trained
from tests.distributed.plain_optim import RECIPES
from tests.distributed.plain_training import plain

pytestmark = pytest.mark.distributed
ARCHITECTURES = ("decllm", "redllm", "entp", "ared")
# A global batch that is cut otherwise is rounded otherwise. Measured over 6 steps, largest relative
# differences: 3e-4 of a loss, 8e-3 of a gradient's norm (ARED's; 2e-3 of the others').
LOSS_TOLERANCE, NORM_TOLERANCE = 1e-3, 2e-2
# Every optimizer and every architecture once, and what stages 1 and 2 do otherwise.
FEW = [("adamw", Case("decllm", stage, precision="bf16", micro_batch=3)) for stage in (1, 2)] + [
    (name, RECIPES[name].case(arch, stage, precision="bf16", micro_batch=micro))
    for name, arch, stage, micro in (
        ("adamw", "ared", 3, 6),
        ("adafactor", "redllm", 3, 2),
        ("factored", "decllm", 3, 6),
        ("muon", "entp", 3, 6),
        ("muon", "decllm", 1, 2),
        ("muon", "decllm", 2, 2),
    )
]
ALL = [
    (name, recipe.case(arch, 3, precision="bf16", micro_batch=3))
    for arch, (name, recipe) in product(ARCHITECTURES, RECIPES.items())
]


def differences(
    cases: list[tuple[str, Case]], shards: Path, steps: int
) -> dict[str, tuple[float, float]]:
    """By case, the largest relative difference of losses and of norms from one process in bf16."""
    curves = trained([case for _, case in cases], shards, steps, 2, timeout=600)
    found = {}
    for (name, case), curve in zip(cases, curves, strict=True):
        expected = plain(case, shards, steps, RECIPES[name].make)
        norm = largest_difference(norms(curve), norms(expected))
        found[str(case)] = (largest_difference(losses(curve), losses(expected)), norm)
    return found


def norms(curve: Curve) -> Curve:
    return [{"norm": step["norm"]} for step in curve]


def check(found: dict[str, tuple[float, float]]) -> None:
    print(*(f"{name}: loss {a:.1e}, norm {b:.1e}" for name, (a, b) in found.items()), sep="\n")
    assert max(loss for loss, _ in found.values()) < LOSS_TOLERANCE, found
    assert max(norm for _, norm in found.values()) < NORM_TOLERANCE, found


def test_every_optimizer_and_architecture_equals_one_process_in_bf16(shards_dir: Path) -> None:
    check(differences(FEW, shards_dir, 3))


@pytest.mark.soak
def test_so_does_every_optimizer_with_every_architecture(shards_dir: Path) -> None:
    check(differences(ALL, shards_dir, 6))

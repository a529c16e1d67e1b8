"""100 steps of every architecture at every ZeRO stage, against one process of plain PyTorch."""

from __future__ import annotations

import shutil
from itertools import product
from pathlib import Path

import pytest

from tests.distributed.parity import Case, largest_difference, losses, trained
from tests.distributed.plain_training import plain
from tests.distributed.test_bf16 import check as check_bf16
from tests.distributed.test_bf16 import differences as bf16_differences

pytestmark = [pytest.mark.soak, pytest.mark.distributed]
ARCHITECTURES = ("decllm", "redllm", "entp", "ared")
STEPS, TOLERANCE = 100, 1e-5
# A gradient's norm feels rounding that 100 steps have grown sooner than a loss does.
NORM_TOLERANCE = 1e-4
NEEDS_A_COMPILER = pytest.mark.skipif(
    shutil.which("g++") is None, reason="needs a C++ compiler: no g++ on the PATH"
)
OFFLOADS = {0: [""], 1: ["", "optimizer"], 2: ["", "optimizer"], 3: ["", "optimizer", "both"]}


def grid(arch: str) -> list[Case]:
    """Every stage with every offload it has; accumulation and recomputation take turns.

    Each architecture begins with another turn: over all four every row comes up.
    """
    turns = list(product((6, 2), (False, True)))
    rows = [(stage, offload) for stage, offloads in OFFLOADS.items() for offload in offloads]
    first = ARCHITECTURES.index(arch)
    return [
        Case(arch, stage, "adamw", *turns[turn % len(turns)], offload, entp_chunk_pairs=300)
        for turn, (stage, offload) in enumerate(rows, start=first)
    ]


def test_every_row_of_the_grid_comes_up() -> None:
    """And every architecture meets each of its columns' choices."""
    grids = [grid(arch) for arch in ARCHITECTURES]
    rows = {
        (case.stage, case.offload, case.micro_batch, case.checkpointing)
        for cases in grids
        for case in cases
    }
    assert len(rows) == 32
    for cases in grids:
        assert {(case.stage, case.offload) for case in cases} == {
            (stage, offload) for stage, offloads in OFFLOADS.items() for offload in offloads
        }
        assert len({(case.micro_batch, case.checkpointing) for case in cases}) == 4


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_hundred_steps_equal_plain_pytorch(arch: str, shards_dir: Path) -> None:
    cases = grid(arch)
    expected = plain(cases[0], shards_dir, STEPS)
    curves = trained(cases, shards_dir, STEPS, 2, timeout=900)
    worst, worst_norm = (
        {
            str(case): largest_difference(keep(ours), keep(expected))
            for case, ours in zip(cases, curves, strict=True)
        }
        for keep in (losses, lambda curve: curve)
    )
    print(worst, worst_norm)
    assert max(worst.values()) < TOLERANCE, worst
    assert max(worst_norm.values()) < NORM_TOLERANCE, worst_norm


@NEEDS_A_COMPILER
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_compiled_model_equals_plain_pytorch(arch: str, shards_dir: Path) -> None:
    """At every stage that may be compiled; an architecture a process, which keeps what it made."""
    cases = [Case(arch, stage, compile=True, entp_chunk_pairs=300) for stage in (1, 0, 2)]
    expected = plain(cases[0], shards_dir, 3)
    for case, curve in zip(cases, trained(cases, shards_dir, 3, 2, timeout=900), strict=True):
        assert largest_difference(curve, expected) < TOLERANCE, str(case)


@NEEDS_A_COMPILER
def test_a_compiled_model_in_bf16_with_recomputation_equals_one_process(shards_dir: Path) -> None:
    """Gradients added up over micro-batches; one layer, as it takes long to compile more."""
    cases = [
        Case(
            stage=stage,
            micro_batch=3,
            checkpointing=True,
            precision="bf16",
            compile=True,
            model=(("num_layers", 1),),
        )
        for stage in (1, 2)
    ]
    check_bf16(bf16_differences([("adamw", case) for case in cases], shards_dir, 3))

"""100 steps of every architecture at every ZeRO stage, against one process of plain PyTorch."""

from __future__ import annotations

import shutil
from itertools import cycle, product
from pathlib import Path

import pytest

from tests.distributed.parity import Case, largest_difference, losses, trained
from tests.distributed.plain_training import plain

pytestmark = [pytest.mark.soak, pytest.mark.distributed]
ARCHITECTURES = ("decllm", "redllm", "entp", "ared")
STEPS, TOLERANCE = 100, 1e-5
# A gradient's norm feels rounding that 100 steps have grown sooner than a loss does.
NORM_TOLERANCE = 1e-4
OFFLOADS = {0: [""], 1: ["", "optimizer"], 2: ["", "optimizer"], 3: ["", "optimizer", "both"]}


def grid(arch: str) -> list[Case]:
    """Every stage with every offload it has; accumulation and recomputation take turns."""
    turns = cycle(product((6, 2), (False, True)))
    return [
        Case(arch, stage, "adamw", micro_batch, checkpointing, offload, entp_chunk_pairs=300)
        for (micro_batch, checkpointing), (stage, offload) in zip(
            turns, [(s, o) for s, offloads in OFFLOADS.items() for o in offloads], strict=False
        )
    ]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_hundred_steps_equal_plain_pytorch(arch: str, shards_dir: Path) -> None:
    cases = grid(arch)
    assert len(cases) == 8
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


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler: no g++ on the PATH")
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_compiled_model_equals_plain_pytorch(arch: str, shards_dir: Path) -> None:
    """At every stage that may be compiled; an architecture a process, which keeps what it made."""
    cases = [Case(arch, stage, compile=True, entp_chunk_pairs=300) for stage in (1, 0, 2)]
    expected = plain(cases[0], shards_dir, 3)
    for case, curve in zip(cases, trained(cases, shards_dir, 3, 2, timeout=900), strict=True):
        assert largest_difference(curve, expected) < TOLERANCE, str(case)

"""Optimizers over the grid: Adafactor's slices for 50 steps, training for a hundred."""

from __future__ import annotations

from itertools import combinations, product
from pathlib import Path
from random import Random
from typing import Any

import pytest

from tests.distributed.harness import run_ranks
from tests.distributed.parity import largest_difference, losses, too_large, trained
from tests.distributed.plain_optim import RECIPES
from tests.distributed.plain_training import plain
from tests.distributed.sharded_optim import Case, run_cases
from tests.distributed.test_optim_parity import TOLERANCE, UNEVEN
from tests.distributed.test_optim_sharded import EVERYTHING, FACTORED, OFFLOAD, PAPER, SMALL
from tests.pipeline.optim.plain_adafactor import Rule
from tests.soak.test_parity import NORM_TOLERANCE

pytestmark = [pytest.mark.soak, pytest.mark.distributed]
RULES = [PAPER, FACTORED, EVERYTHING, Rule(beta1=0.9, clipping_threshold=None)]


def sharded_cases() -> list[Case]:
    """Every rule at every stage, with the cuts and groups of its turn."""
    cuts: dict[int, list[dict[str, Any]]] = {
        **{0: [{}], 1: [{}, OFFLOAD], 2: [OFFLOAD, {}]},
        3: [{}, OFFLOAD, SMALL],
    }
    found = []
    for stage, choices in cuts.items():
        turns = product(RULES, (1, 2)) if stage == 3 else zip(RULES, (1, 1, 2, 2), strict=True)
        for turn, (rule, groups) in enumerate(turns):
            found.append(Case(stage, rule, choices[turn % len(choices)], groups))
    return found


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_shards_step_as_whole_parameters_do(world_size: int) -> None:
    cases = sharded_cases()
    for found in run_ranks(run_cases, world_size, cases, 50, timeout=900):
        assert found == pytest.approx([0.0] * len(cases), abs=1e-6)


# One choice of each line. AdamW's rows are in test_parity.py beside this: every architecture at
# every stage with every offload, and over the architectures each of these with every micro_batch
# and recomputation.
CHOICES: tuple[tuple[Any, ...], ...] = (
    ("decllm", "redllm", "entp", "ared"),
    ("adafactor", "factored", "muon"),
    (1, 2, 3),  # ZeRO's stage
    (6, 2),  # micro_batch: at once, or in three parts
    (False, True),  # activation checkpointing
    ("", "optimizer", "both"),  # offload; of parameters at stage 3 alone
)


def met(row: tuple[Any, ...]) -> set[tuple[Any, ...]]:
    """What `row` shows together: its architecture, optimizer and stage, and every two choices."""
    return {row[:3], *((i, row[i], j, row[j]) for i, j in combinations(range(len(row)), 2))}


def covering() -> list[tuple[Any, ...]]:
    """Rows of CHOICES that show all there is to show together, found greedily."""
    possible = [row for row in product(*CHOICES) if row[5] != "both" or row[2] == 3]
    Random(0).shuffle(possible)  # of rows that show as much, not always the plainest
    missing = set().union(*map(met, possible))
    rows = []
    while missing:
        rows.append(max(possible, key=lambda row: len(met(row) & missing)))
        missing -= met(rows[-1])
    return rows


@pytest.mark.parametrize("arch", CHOICES[0])
def test_a_hundred_steps_of_every_optimizer(arch: str, shards_dir: Path) -> None:
    """Every architecture, optimizer and stage. Accumulation, checkpointing and offload are not
    crossed with those in full: a covering array holds every pair of choices."""
    rows = covering()
    assert {row[:3] for row in rows} == set(product(*CHOICES[:3]))
    for i, j in combinations(range(5), 2):
        assert {(row[i], row[j]) for row in rows} == set(product(CHOICES[i], CHOICES[j]))
    cases, expected, known = [], [], {}
    for mine, name, stage, micro, checkpointing, offload in rows:
        if mine != arch:
            continue
        case = RECIPES[name].case(
            arch,
            stage,
            micro_batch=micro,
            checkpointing=checkpointing,
            offload=offload,
            entp_chunk_pairs=300,
            mask_seed=UNEVEN if name == "muon" else None,
        )
        if name not in known:
            known[name] = plain(case, shards_dir, 100, RECIPES[name].make)
        cases.append(case)
        expected.append(known[name])
    curves = trained(cases, shards_dir, 100, 2, timeout=900)
    found, with_norms = (
        {
            str(case): largest_difference(keep(curve), keep(right))
            for case, curve, right in zip(cases, curves, expected, strict=True)
        }
        for keep in (losses, lambda curve: curve)
    )
    print(found, with_norms)
    assert not too_large(found, TOLERANCE)
    assert not too_large(with_norms, NORM_TOLERANCE)

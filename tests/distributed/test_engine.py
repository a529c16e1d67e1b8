"""The engine's one face over ZeRO's stages: norms, sums of many passes, steps not finite."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.distributed.harness import run_ranks
from tests.distributed.parity import Case, run_config

pytestmark = pytest.mark.distributed


def steps_with_a_poisoned_one(cases: list[Case]) -> list[list[tuple[bool, float, float, float]]]:
    """Three steps on this rank, the second with one matrix's gradient no number on rank 1 alone.

    Of each: whether it was applied, the gradient's norm, the loss before it, and a sum over the
    optimizer's state after it.
    """
    from models.batch import Batch
    from models.config import named
    from models.registry import build
    from pipeline import distributed, engine
    from pipeline.optim.build import bind_optimizer, build_optimizer

    world = distributed.start(timeout_seconds=60, threads=1)
    ids = torch.arange(32).view(2, 16)
    batch = Batch(ids, ids + 1, torch.ones_like(ids, dtype=torch.bool))
    curves = []
    for case in cases:
        config = run_config(case, Path(), 3)
        torch.manual_seed(0)
        made = engine.build_engine(
            lambda: build(named("decllm", "nano", vocab_size=64)),
            lambda model, config=config: build_optimizer(model, config),  # type: ignore[misc]
            config,
            case.deepspeed_file(),
        )
        bind_optimizer(made)
        found = []
        for step in range(3):
            terms = made.module(batch)
            poisoned = dict(made.module.named_parameters())[POISONED_MATRIX]
            poison = math.nan if step == 1 and world.rank == 1 else 1.0
            hook = poisoned.register_hook(lambda gradient, poison=poison: gradient * poison)
            engine.backward(made, terms.objective / 32)
            hook.remove()
            outcome = engine.step(made)
            found.append((outcome.applied, outcome.grad_norm, float(terms.nll), size_of(made)))
        curves.append(found)
        made.destroy()
    return curves


def size_of(engine: object) -> float:
    """The sum of what this rank's optimizer has stored."""
    from pipeline import zero_layout

    return sum(
        float(value.double().abs().sum())
        for flat in zero_layout.flat_tensors(engine)
        for value in zero_layout.optimizer_state(engine, flat).values()
        if torch.is_tensor(value)
    )


POISONED_MATRIX = "blocks.1.feed_forward.down.weight"
POISONED = [
    *(Case(stage=stage) for stage in (0, 1, 2, 3)),
    *(Case(stage=stage, precision="bf16") for stage in (1, 2, 3)),
    *(
        Case(stage=stage, optimizer="muon", precision=precision)
        for stage in (1, 2, 3)
        for precision in ("fp32", "bf16")
    ),
    *(Case(stage=stage, optimizer="muon", offload="optimizer") for stage in (2, 3)),
]


def test_a_step_that_is_not_finite_on_one_rank_moves_no_weight_and_no_state() -> None:
    curves = run_ranks(steps_with_a_poisoned_one, 2, POISONED)
    for case, ours, theirs in zip(POISONED, *curves, strict=True):
        assert [point[0] for point in ours] == [True, False, True], case
        assert [point[:2] for point in ours][::2] == [point[:2] for point in theirs][::2], case
        assert not theirs[1][0], case
        assert not math.isfinite(ours[1][1]), case
        losses = [point[2] for point in ours]
        # The first step moved the weights, the second did not.
        assert losses[1] < losses[0], case
        assert losses[2] == losses[1], case
        for states in ([point[3] for point in rank] for rank in (ours, theirs)):
            assert states[0] == states[1] != states[2], case


class Slope(nn.Module):
    """Its gradient is 1 in each of 64 weights."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(64))

    def forward(self) -> torch.Tensor:
        return self.weight.sum()


PASSES = 300  # in bf16 1 + … + 1 stops at 256


def norms_of_many_passes(cases: list[Case]) -> list[float]:
    """By case, the norm that a step reports after `PASSES` backward passes."""
    from pipeline import distributed, engine

    distributed.start(timeout_seconds=60, threads=1)
    found = []
    for case in cases:
        made = engine.build_engine(
            Slope,
            lambda model: torch.optim.SGD(model.parameters(), lr=0.0),
            run_config(case, Path(), 1),
            case.deepspeed_file(),
        )
        for _ in range(PASSES):
            engine.backward(made, made.module())
        found.append(engine.step(made).grad_norm)
        made.destroy()
    return found


def test_many_passes_of_a_step_add_up_in_fp32() -> None:
    cases = [Case(stage=stage, precision="bf16") for stage in (1, 2, 3)]
    cases += [Case(stage=1, precision="bf16", offload="optimizer")]
    assert run_ranks(norms_of_many_passes, 1, cases)[0] == pytest.approx([PASSES * 8.0] * 4)

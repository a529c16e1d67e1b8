"""Checkpoints and steps that are skipped: what may hold bad weights is not saved."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.entry import flags, losses, records
from tests.distributed.harness import run_ranks
from tests.distributed.test_guards import words
from tests.distributed.test_policies import nan_at, prove, with_trainer

pytestmark = pytest.mark.distributed


def spoil_weights(trainer: Any, step: int) -> None:
    """After `step` a row of a parameter is infinite, once, and losses are no numbers any more."""
    original, done = trainer._train_step, []

    def spoiled(self: Any) -> Any:
        record = original(self)
        if self.step == step and not done:
            import deepspeed
            from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param

            done.append(step)
            parameter = next(self.engine.module.parameters())
            value = safe_get_full_fp32_param(parameter)
            value[3] = math.inf
            safe_set_full_fp32_param(parameter, value)
            with torch.no_grad(), deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                parameter.data[3] = math.inf
        return record

    trainer._train_step = spoiled


def test_weights_that_went_bad_are_not_saved_in_the_place_of_good_ones(
    shards_dir: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    some = {"steps": 20, "checkpoint_every": 4, "max_skipped_steps": 4, "keep_checkpoints": 1}
    asked = words(flags(run, shards_dir, **some, on_nonfinite="rollback"))
    run_ranks(with_trainer, 2, asked, spoil_weights, 6)
    # A checkpoint was due at step 8, which was skipped.
    (back,) = [r for r in records(run, "checkpoints.jsonl") if r["event"] == "rolled_back"]
    assert (back["step"], back["from"]) == (4, 10)
    assert len(losses(run)) == 20
    assert all(math.isfinite(loss) for step, loss in losses(run).items())
    assert prove(run)["discarded"] == 4


def test_a_checkpoint_that_falls_due_in_a_skipped_step_is_made_after_it(
    shards_dir: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    some = {"steps": 7, "checkpoint_every": 4, "keep_checkpoints": 9}
    run_ranks(with_trainer, 2, words(flags(run, shards_dir, **some)), nan_at, (3,))
    saved = [r["step"] for r in records(run, "checkpoints.jsonl") if r["event"] == "saved"]
    assert saved == [5, 7]

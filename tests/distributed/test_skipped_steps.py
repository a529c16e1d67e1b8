"""Steps that are not finite: skipped on every rank, counted, and too many of them end the run."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from tests.distributed.entry import argv, flags, losses, records, run_entry, train
from tests.distributed.harness import run_ranks

pytestmark = pytest.mark.distributed


def test_a_run_that_diverges_ends_with_the_cause(shards_dir: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(AssertionError, match="max_skipped_steps=2: that many steps in a row"):
        run_entry("pretrain", 2, flags(run, shards_dir, lr=1e30, max_skipped_steps=2, grad_clip=0))
    skipped = [r["skipped"] for r in records(run, "metrics.jsonl")]
    assert skipped[-2:] == [True, True]
    assert records(run, "metrics.jsonl")[-1]["grad_norm"] is None


def poison_steps(words: list[str], terms: dict[int, str]) -> None:
    """Train with one of the loss's terms not a number on rank 1 alone in some steps."""
    from pipeline import trainer

    original = trainer.Trainer._backward

    def poisoned(self: trainer.Trainer, *args: object) -> torch.Tensor:
        model = self.engine.module
        if self.step in terms and self.world.rank == 1:
            chunks, term = model.loss_chunks, terms[self.step]
            model.loss_chunks = lambda *a: (
                t._replace(**{term: getattr(t, term) * float("nan")}) for t in chunks(*a)
            )
            try:
                return original(self, *args)  # type: ignore[arg-type]
            finally:
                del model.loss_chunks
        return original(self, *args)  # type: ignore[arg-type]

    trainer.Trainer._backward = poisoned  # type: ignore[assignment,method-assign]
    assert train(words) == ""


def test_a_step_that_is_not_finite_on_one_rank_is_skipped_on_all_and_training_goes_on(
    shards_dir: Path, tmp_path: Path
) -> None:
    run, whole = tmp_path / "run", tmp_path / "whole"
    asked = flags(run, shards_dir)
    run_entry("pretrain", 2, flags(whole, shards_dir))
    poisoned = {2: "objective", 4: "nll"}
    run_ranks(poison_steps, 2, argv(asked), poisoned)
    metrics = records(run, "metrics.jsonl")
    assert [r["skipped"] for r in metrics] == [False, False, True, False, True, False]
    assert metrics[-1]["skipped_steps"] == 2
    events = [r["event"] for r in records(run, "ledger.jsonl")]
    assert events == ["applied", "applied", "skipped", "applied", "skipped", "applied"]
    # A loss that is no number moves no weight even where its gradient is finite. The weights did
    # not move in the third step, and later losses are those of finite weights.
    ours, undisturbed = losses(run), losses(whole)
    assert [ours[s] for s in (1, 2, 3)] == [undisturbed[s] for s in (1, 2, 3)]
    assert all(math.isfinite(ours[s]) and ours[s] != undisturbed[s] for s in (4, 6))
    assert ours[5] is None
    assert all(r["grad_norm"] is None for r in metrics if r["skipped"])

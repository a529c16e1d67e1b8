"""A run stopped after any of its steps and gone on with elsewhere is the run nobody stopped."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from pipeline.checkpointing.folder import digest, read_state
from tests.distributed.entry import flags, losses, records, run_entry

pytestmark = [pytest.mark.distributed, pytest.mark.soak]
STEPS = 6


def stopped_at(whole: Path, step: int, to: Path) -> Path:
    """A copy of `whole` as a stop after `step` would have left it."""
    shutil.copytree(whole, to)
    for path in (to / "checkpoints").glob("step_*"):
        if int(path.name.removeprefix("step_")) > step:
            shutil.rmtree(path)
    (to / "FINISHED").unlink()
    for name in ("metrics.jsonl", "ledger.jsonl"):
        lines = (to / name).read_text().splitlines(keepends=True)
        (to / name).write_text("".join(lines[:step]))
    return to


def batches(run: Path) -> list[tuple[int, int, str]]:
    """What each step trained on: its positions and the hash of its samples."""
    return [(r["start"], r["end"], r["hash"]) for r in records(run, "ledger.jsonl")]


def state(run: Path) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """What the run ended with: the hash of every tensor, and the optimizer's numbers."""
    last = run / "checkpoints" / f"step_{STEPS}"
    return digest(last), read_state(last)["optimizer"]


@pytest.mark.parametrize(("before", "after"), [(2, 2), (2, 1), (1, 3), (3, 2)])
def test_any_step_and_any_ranks(before: int, after: int, shards_dir: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    changes = {"checkpoint_every": 1, "keep_checkpoints": 9, "steps": STEPS}
    run_entry("pretrain", before, flags(whole, shards_dir, **changes))
    expected, finished = losses(whole), state(whole)
    for step in range(1, STEPS):
        run = stopped_at(whole, step, tmp_path / f"{step}")
        run_entry("pretrain", after, flags(run, shards_dir, **changes))
        attempts = [r["attempt"] for r in records(run, "metrics.jsonl")]
        assert attempts == [1] * step + [2] * (STEPS - step)
        assert losses(run) == (expected if before == after else pytest.approx(expected, rel=1e-5))
        assert batches(run) == batches(whole)
        if before == after:
            # Parameters and optimizer states, bit for bit; what `stopped_at` left is older.
            assert state(run) == finished


@pytest.mark.parametrize(("between", "steps"), [("zero1", range(1, STEPS - 1)), ("zero2", [2])])
def test_another_stage_in_between(
    between: str, steps: Sequence[int], shards_dir: Path, tmp_path: Path
) -> None:
    """Stage 3 up to any step, another stage for one step more, and stage 3 to the end."""
    whole = tmp_path / "whole"
    changes = {"checkpoint_every": 1, "keep_checkpoints": 9, "steps": STEPS}
    run_entry("pretrain", 2, flags(whole, shards_dir, **changes))
    for step in steps:
        elsewhere = stopped_at(whole, step, tmp_path / f"{step}")
        other = {**changes, "ds_config": f"ds_configs/{between}.json"}
        run_entry("pretrain", 2, flags(elsewhere, shards_dir, **other))
        assert losses(elsewhere) == pytest.approx(losses(whole), rel=1e-5)
        back = stopped_at(elsewhere, step + 1, tmp_path / f"{step}-back")
        run_entry("pretrain", 2, flags(back, shards_dir, **changes))
        attempts = [r["attempt"] for r in records(back, "metrics.jsonl")]
        assert attempts == [1] * step + [2] + [3] * (STEPS - step - 1)
        assert losses(back) == pytest.approx(losses(whole), rel=1e-5)
        assert batches(back) == batches(elsewhere) == batches(whole)

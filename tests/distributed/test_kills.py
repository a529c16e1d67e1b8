"""A supervised run whose parts are killed again and again ends as one that nobody disturbed."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.entry import flags, losses, records, run_entry
from tests.distributed.kills import Kill, Supervised, final_state, flip_a_bit
from tools.cli import dispatch
from tools.supervise.processes import processes_of

pytestmark = pytest.mark.distributed


def asked(run: Path, shards: Path, steps: int) -> dict[str, Any]:
    """What the run is told: dropout, and a save at every sixth step."""
    return flags(run, shards, steps=steps, checkpoint_every=6, **{"model.dropout": 0.1})


def check(
    kills: list[Kill],
    steps: int,
    shards: Path,
    folder: Path,
    between: Callable[[Path], object] = lambda run: None,
) -> str:
    """Kill, wait for the end, compare with an undisturbed run; what was said."""
    whole, run = folder / "whole", folder / "run"
    run_entry("pretrain", 2, asked(whole, shards, steps))
    supervised = Supervised(asked(run, shards, steps), ranks=2, between=between)
    moment = random.Random(0)
    try:
        for kill in kills:
            assert supervised.strike(kill, moment), f"finished before {kill}"
        said = supervised.finish()
        assert not processes_of(run)
    finally:
        supervised.end()
    assert losses(run) == losses(whole)
    assert final_state(run, steps) == final_state(whole, steps)
    assert [r["loss"] for r in records(run, "eval.jsonl")][-1] == (
        [r["loss"] for r in records(whole, "eval.jsonl")][-1]
    )
    # Exits with 1 where it finds anything.
    dispatch(["verify", str(run)])
    return said


def test_a_rank_and_the_launcher_killed(shards_dir: Path, tmp_path: Path) -> None:
    kills = [Kill("rank", "save", 11, 0.0), Kill("launch", "step", 14, 0.01)]
    said = check(kills, 36, shards_dir, tmp_path)
    # Each start went on from a checkpoint: the save that was cut off was not the first.
    assert said.count("goes on from step") == 2


@pytest.mark.soak
def test_a_bit_flipped_in_between(shards_dir: Path, tmp_path: Path) -> None:
    kills = [Kill("supervisor", "step", 15, 0.0)]
    said = check(kills, 24, shards_dir, tmp_path, between=flip_a_bit)
    assert "is refused" in said
    assert "goes on from step 6 (the checkpoint of step 12 is gone)" in said
    assert list((tmp_path / "run" / "checkpoints").glob("damaged_step_12*"))


@pytest.mark.soak
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("seed", [2, 3])
def test_ten_kills_at_random_moments(seed: int, shards_dir: Path, tmp_path: Path) -> None:
    moment = random.Random(seed)
    kills = [Kill.draw(moment) for _ in range(10)]
    print("\n".join(map(str, kills)))
    # Enough steps that it cannot finish before the last one.
    steps = sum(kill.steps + 10 for kill in kills)
    print(check(kills, steps, shards_dir, tmp_path))

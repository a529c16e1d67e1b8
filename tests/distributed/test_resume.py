"""A run goes on after a stop, a kill or damage to its checkpoints, on any number of ranks."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest

from pipeline.run_folder import RunFolder
from tests.distributed.entry import argv, flags, flip_a_bit, losses, records, run_entry, train
from tests.distributed.harness import run_ranks
from tools.frontier.run_folder import read_run

pytestmark = pytest.mark.distributed


def stop_in_step(words: list[str], step: int) -> None:
    """Train, and get SIGINT on rank 1 alone while step `step` is under way."""
    from pipeline import trainer

    original = trainer.Trainer._backward

    def interrupted(self: trainer.Trainer, *args: object) -> object:
        if self.step == step and self.world.rank == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, *args)  # type: ignore[arg-type]

    trainer.Trainer._backward = interrupted  # type: ignore[assignment,method-assign]
    with pytest.raises(SystemExit, match="130"):
        train(words)


@pytest.mark.parametrize("arch", ["decllm", "entp"])
def test_a_stopped_run_goes_on_bit_for_bit(arch: str, shards_dir: Path, tmp_path: Path) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    changes = {"model.dropout": 0.1}
    run_entry("pretrain", 2, flags(whole, shards_dir, arch, **changes))
    asked = flags(stopped, shards_dir, arch, **changes)
    run_ranks(stop_in_step, 2, argv(asked), 2)
    assert not (stopped / "FINISHED").exists()
    assert list(losses(stopped)) == [1, 2, 3]
    run_entry("pretrain", 2, asked)
    # It went on where it stopped; a start from scratch would give the same losses too.
    assert [(r["step"], r["attempt"]) for r in records(stopped, "metrics.jsonl")] == [
        *[(step, 1) for step in (1, 2, 3)],
        *[(step, 2) for step in (4, 5, 6)],
    ]
    assert losses(stopped) == losses(whole)
    assert records(stopped, "eval.jsonl")[-1]["loss"] == records(whole, "eval.jsonl")[-1]["loss"]
    totals = [records(run, "metrics.jsonl")[-1]["flops_hardware"] for run in (whole, stopped)]
    assert totals[0] == totals[1]


def stop_in_an_evaluation(words: list[str]) -> None:
    """Train, and get SIGINT on rank 1 alone when the finished model is to be scored."""
    from pipeline.callbacks import evaluation

    original = evaluation.evaluate

    def interrupted(*args: object, **kwargs: object) -> object:
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGINT)
        return original(*args, **kwargs)  # type: ignore[arg-type]

    evaluation.evaluate = interrupted  # type: ignore[assignment]
    with pytest.raises(SystemExit, match="130"):
        train(words)


def test_a_stop_in_the_last_evaluation_is_answered_in_it(shards_dir: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    asked = flags(run, shards_dir, steps=2)
    run_ranks(stop_in_an_evaluation, 2, argv(asked))
    assert not (run / "FINISHED").exists()
    assert not (run / "eval.jsonl").exists()
    run_entry("pretrain", 2, asked)
    # What was trained is saved, and only scored again.
    assert len(records(run, "metrics.jsonl")) == 2
    assert [(r["final"], r["attempt"]) for r in records(run, "eval.jsonl")] == [(True, 2)]


def test_a_run_goes_on_at_another_world_size(shards_dir: Path, tmp_path: Path) -> None:
    """By the same command: on three ranks a micro-batch of 6 does not divide the share of 4."""
    whole = tmp_path / "whole"
    changes = {"checkpoint_every": 2, "keep_checkpoints": 9, "micro_batch": 6}
    run_entry("pretrain", 2, flags(whole, shards_dir, **changes))
    for world_size, micro_batch in ((1, 6), (3, 4)):
        moved = tmp_path / f"on-{world_size}"
        shutil.copytree(whole, moved)
        for step in (4, 6):
            shutil.rmtree(moved / "checkpoints" / f"step_{step}")
        (moved / "FINISHED").unlink()
        run_entry("pretrain", world_size, flags(moved, shards_dir, **changes))
        assert RunFolder(moved).read_config()["run"]["micro_batch"] == micro_batch
        attempts = [r for r in records(moved, "metrics.jsonl") if r["attempt"] == 2]
        assert [r["step"] for r in attempts] == [3, 4, 5, 6]
        assert losses(moved) == pytest.approx(losses(whole), rel=1e-5)


def test_a_damaged_checkpoint_is_refused_and_the_one_before_is_used(
    shards_dir: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    asked = flags(run, shards_dir, checkpoint_every=3, eval_every=1)
    run_entry("pretrain", 2, asked)
    before = losses(run)
    (run / "FINISHED").unlink()
    flip_a_bit(run / "checkpoints" / "step_6" / "rank_00001.safetensors")
    run_entry("pretrain", 2, asked)
    again = [r for r in records(run, "metrics.jsonl") if r["attempt"] == 2]
    assert {r["step"]: r["loss"] for r in again} == {s: before[s] for s in (4, 5, 6)}
    # What is trained again is scored again: the frontier takes no score of an attempt given up.
    scored = [(e.step, e.attempt) for e in read_run(run, "run").evaluations]
    assert scored == [(1, 1), (2, 1), (3, 1), (4, 2), (5, 2), (6, 2)]
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == ["BEST.json", "damaged_step_6", "step_3", "step_6"]

    (run / "FINISHED").unlink()
    for step in (3, 6):
        flip_a_bit(run / "checkpoints" / f"step_{step}" / "rank_00000.safetensors")
    with pytest.raises(AssertionError, match="none of 2 is whole"):
        run_entry("pretrain", 2, asked)


def test_a_kill_between_the_last_checkpoint_and_the_end_loses_nothing(
    shards_dir: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    asked = flags(run, shards_dir, keep_checkpoints=1)
    run_entry("pretrain", 2, asked)
    final = records(run, "eval.jsonl")[-1]["loss"]
    made = (run / "checkpoints" / "step_6" / "COMPLETE.json").stat().st_mtime_ns
    (run / "FINISHED").unlink()
    for name in ("metrics.jsonl", "eval.jsonl"):
        with (run / name).open("a") as file:
            file.write('{"step": 7, "torn')
    # And between the renames by which a checkpoint takes another's place: the newer is damaged.
    hidden = [run / "checkpoints" / f".step_6.{kind}" for kind in ("replaced", "partial")]
    (run / "checkpoints" / "step_6").rename(hidden[0])
    shutil.copytree(*hidden)
    flip_a_bit(hidden[1] / "rank_00001.safetensors")
    run_entry("pretrain", 2, asked)
    assert (run / "FINISHED").exists()
    assert len(records(run, "metrics.jsonl")) == 6
    last = records(run, "eval.jsonl")[-1]
    assert (last["loss"], last["final"], last["attempt"]) == (final, True, 2)
    # The only checkpoint was not written again, and so never missing.
    assert (run / "checkpoints" / "step_6" / "COMPLETE.json").stat().st_mtime_ns == made


def test_what_was_completed_and_is_gone_is_never_a_start_from_scratch(
    shards_dir: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    asked = flags(run, shards_dir, checkpoint_every=3, eval_every=1)
    run_entry("pretrain", 2, asked)
    before = losses(run)
    (run / "FINISHED").unlink()
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(AssertionError, match="completed one at step 6 and none is there"):
        run_entry("pretrain", 2, asked)
    run_entry("pretrain", 2, {**asked, "restart": "true"})
    events = [(r["event"], r.get("step")) for r in records(run, "checkpoints.jsonl")]
    again = [("saved", 3), ("saved", 6)]
    assert events == [*again, ("restarted", None), *again]
    assert losses(run) == before
    scored = [(e.step, e.attempt) for e in read_run(run, "run").evaluations]
    assert scored == [(step, 2) for step in range(1, 7)]
    # A checkpoint of another configuration or other data is not this run's.
    (run / "FINISHED").unlink()
    (run / "config.json").unlink()
    with pytest.raises(AssertionError, match=r"seed=7: checkpoint .*step_6 has 0"):
        run_entry("pretrain", 2, {**asked, "seed": 7})

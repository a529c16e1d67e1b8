"""Saving beside the training: the same losses, at most one save under way, every byte read back."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from pipeline.checkpointing import folder
from pipeline.checkpointing.names import list_steps
from tests.distributed.entry import argv, flags, losses, records, train
from tests.distributed.harness import run_ranks
from tests.power_cut import PowerCut

pytestmark = pytest.mark.distributed


def slow_writer(words: list[str]) -> list[tuple[int, int, bool]]:
    """Train with files that take their time; (step, saves under way, of which beside the training)
    at the start of each file's writing."""
    import threading
    import time

    from pipeline import trainer
    from pipeline.checkpointing import writer

    seen: list[tuple[int, int, bool]] = []
    under_way = 0
    step = 0
    plain, plain_step = writer.write_tensors, trainer.Trainer._train_step

    def counting(self: trainer.Trainer) -> Any:
        nonlocal step
        step = self.step
        return plain_step(self)

    def slow(*args: Any) -> Any:
        nonlocal under_way
        under_way += 1
        seen.append((step, under_way, threading.current_thread() is not threading.main_thread()))
        time.sleep(0.3)
        try:
            return plain(*args)
        finally:
            under_way -= 1

    writer.write_tensors = slow
    trainer.Trainer._train_step = counting  # type: ignore[method-assign]
    assert train(words) == ""
    return seen


def test_saving_beside_the_training_changes_no_loss_and_one_save_is_under_way(
    shards_dir: Path, tmp_path: Path
) -> None:
    runs = {"true": tmp_path / "beside", "false": tmp_path / "between"}
    for beside, run in runs.items():
        asked = flags(run, shards_dir, checkpoint_every=1, keep_checkpoints=9, eval_every=2)
        seen = run_ranks(slow_writer, 2, argv({**asked, "async_checkpoints": beside}))[0]
        assert len(seen) == 6
        assert {count for _, count, _ in seen} == {1}
        assert {thread for _, _, thread in seen} == {beside == "true"}
        assert [r["step"] for r in records(run, "checkpoints.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert losses(runs["true"]) == losses(runs["false"])
    # What was saved while the training went on is the state of its own step.
    from pipeline.checkpointing.folder import digest

    for step in (1, 3, 6):
        ours, theirs = (digest(run / "checkpoints" / f"step_{step}") for run in runs.values())
        assert ours == theirs
    blocked = [
        sum(r["blocked_seconds"] for r in records(run, "checkpoints.jsonl")[:1])
        for run in runs.values()
    ]
    assert blocked[0] < 0.3 <= blocked[1]


def fail_while_saving(words: list[str]) -> str:
    """Train with files that take their time."""
    import time

    from pipeline.checkpointing import writer

    plain = writer.write_tensors

    def slow(*args: Any) -> Any:
        time.sleep(0.5)
        return plain(*args)

    writer.write_tensors = slow
    return train(words)


def test_an_error_of_the_training_waits_for_the_save_under_way(
    shards_dir: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    changes = {"checkpoint_every": 1, "lr": 1e30, "max_skipped_steps": 2, "grad_clip": 0}
    error = run_ranks(fail_while_saving, 1, argv(flags(run, shards_dir, **changes)))[0]
    assert "max_skipped_steps=2" in error
    last = records(run, "metrics.jsonl")[-1]["step"]
    # Skipped steps are not saved: they may come of what the weights have become.
    whole = run / "checkpoints" / f"step_{last - 2}"
    assert list_steps(run / "checkpoints")[0] == last - 2
    assert folder.fault(whole) is None
    assert "max_skipped_steps=2" in run_ranks(train, 1, argv(flags(run, shards_dir, **changes)))[0]
    assert records(run, "metrics.jsonl")[-1]["step"] == last


def time_out(checkpoints: Path) -> list[str]:
    """Three saves by a writer whose ranks wait one second.

    Rank 1 is slow at the first, and its disk keeps another byte at the third.
    """
    import time

    import torch

    from pipeline import distributed
    from pipeline.checkpointing import writer

    plain = writer.write_tensors
    world = distributed.start(timeout_seconds=60, threads=1)
    ours = writer.Writer(checkpoints, world, timeout_seconds=1)
    errors = []
    for step in (1, 2, 3):

        def slow(*args: Any, step: int = step) -> Any:
            time.sleep(2 if (step, world.rank) == (1, 1) else 0)
            written = plain(*args)
            if (step, world.rank) == (3, 1):
                with args[0].open("r+b") as file:
                    file.seek(-1, os.SEEK_END)
                    file.write(b"\1")
            return written

        writer.write_tensors = slow
        piece = writer.Piece("master/a", (8,), 4 * world.rank, torch.ones(4))
        ours.start([piece], {"step": step}, background=True)
        outcome = ours.wait()
        assert outcome is not None
        errors.append(outcome.error)
    return errors


def test_a_save_that_timed_out_does_not_spoil_the_next_and_what_is_written_is_read_back(
    tmp_path: Path,
) -> None:
    for first, second, third in run_ranks(time_out, 2, tmp_path):
        assert first
        assert second == ""
        assert third == "rank 1: the disk gives back other bytes than were written"
    assert folder.fault(tmp_path / "step_2") is None
    assert folder.list_steps(tmp_path) == [2]


def save_with_the_power_watched(run: Path) -> None:
    """Two saves on this rank; whenever one is complete a power cut would leave all of it."""
    import json

    import torch

    from pipeline import distributed
    from pipeline.checkpointing.names import COMPLETE
    from pipeline.checkpointing.writer import Piece, Writer
    from pipeline.run_folder import RunFolder

    world = distributed.start(timeout_seconds=60, threads=1)
    completed = []

    def check(source: Path, target: Path) -> None:
        if target.name == COMPLETE:
            completed.append(target.parent.name)
            for name in json.loads(source.read_text())["sha256"]:
                assert disk.has_bytes(target.parent / name), (target, name)

    disk = PowerCut(run.parents[1], pytest.MonkeyPatch(), check)
    folder = RunFolder(run)
    folder.lock()
    writer = Writer(folder.checkpoints, world)
    for step in (1, 2):
        writer.start([Piece("master/a", (8,), 0, torch.ones(8))], {"step": step}, background=True)
        outcome = writer.wait()
        assert outcome is not None
        assert outcome.error == ""
        # Now the one before may go.
        assert disk.leaves(folder.checkpoints / f"step_{step}"), step
    assert completed == [".step_1.partial", ".step_2.partial"]


def test_a_checkpoint_outlives_a_power_cut_before_an_older_one_goes(tmp_path: Path) -> None:
    run_ranks(save_with_the_power_watched, 1, tmp_path / "runs" / "a")

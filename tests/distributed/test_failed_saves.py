"""No harm comes from a full disk, or from a kill in the middle of a save."""

from __future__ import annotations

import os
import re
import resource
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.run_folder import RunFolder
from tests.distributed.entry import argv, flags, records, run_entry, train
from tests.distributed.harness import run_ranks

pytestmark = pytest.mark.distributed


def limit_file_size(words: list[str], at_step: int, number: int) -> str:
    """Train; from `at_step` on no file can grow beyond `number` bytes, as on a full disk."""
    from pipeline import trainer

    plain = trainer.Trainer._train_step

    def limited(self: trainer.Trainer) -> Any:
        if self.step == at_step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (number, resource.RLIM_INFINITY))
        if self.step == at_step + 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        return plain(self)

    trainer.Trainer._train_step = limited  # type: ignore[method-assign]
    return train(words)


@pytest.mark.parametrize("beside", ["true", pytest.param("false", marks=pytest.mark.soak)])
def test_a_save_that_fails_ends_the_run_in_one_line_and_the_last_good_one_goes_on(
    beside: str, shards_dir: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    changes = {"checkpoint_every": 2, "keep_checkpoints": 1, "async_checkpoints": beside}
    asked = flags(run, shards_dir, **changes)
    errors = run_ranks(limit_file_size, 2, argv(asked), 3, 100_000)
    for error in errors:
        assert "that of step 4 could not be written (rank 0: File too large)" in error
        assert error.endswith("the same command goes on from step 2")
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == ["step_2"]
    run_entry("pretrain", 2, asked)
    assert [r["step"] for r in records(run, "metrics.jsonl") if r["attempt"] == 2] == [3, 4, 5, 6]


def test_a_run_may_go_on_past_a_save_that_failed(shards_dir: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    changes = {"checkpoint_every": 2, "keep_checkpoints": 1, "on_failed_save": "go_on"}
    words = argv(flags(run, shards_dir, **changes))
    # No file of the run, metrics.jsonl and TensorBoard's included, can grow for two steps.
    assert run_ranks(limit_file_size, 2, words, 3, 1_000) == ["", ""]
    saves = [(r["step"], r["event"]) for r in records(run, "checkpoints.jsonl")]
    assert saves == [(2, "saved"), (4, "failed"), (6, "saved")]
    for name in ("metrics.jsonl", "ledger.jsonl"):
        assert [r["step"] for r in records(run, name)] == [1, 2, 3, 4, 5, 6]
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == ["BEST.json", "step_6"]


def save_where_little_is_free(checkpoints: Path) -> list[str]:
    """A save on a disk that is said to have room for the tensor alone, and one where there is."""
    from types import SimpleNamespace

    import torch

    from pipeline import distributed
    from pipeline.checkpointing import writer

    world = distributed.start(timeout_seconds=60, threads=1)
    ours = writer.Writer(checkpoints, world, timeout_seconds=30)
    piece = writer.Piece("master/a", (8,), 0, torch.ones(8))
    errors = []
    for step, free in ((1, 32), (2, 1_000_000)):
        shutil.disk_usage = lambda _, free=free: SimpleNamespace(free=free)
        ours.start([piece], {"step": step}, background=True)
        outcome = ours.wait()
        assert outcome is not None
        errors.append(outcome.error)
    return errors


def test_a_save_that_will_not_fit_is_not_begun(tmp_path: Path) -> None:
    ((first, second),) = run_ranks(save_where_little_is_free, 1, tmp_path)
    assert re.fullmatch(r"it needs .* and 32 .* are free", first), first
    assert second == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_2"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2.5 MB."""
    if os.geteuid() != 0:
        pytest.skip("mounting a file system needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2500k", "none", str(disk)], check=False
    )
    if mounted.returncode:
        pytest.skip("no file system may be mounted here")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.mark.privileged
def test_room_is_looked_for_before_a_save(
    small_disk: Path, shards_dir: Path, tmp_path: Path
) -> None:
    """A nano checkpoint takes 0.6 MB: three fit beside the rest, and a fourth does not."""
    asked = flags(small_disk / "run", shards_dir, checkpoint_every=1, keep_checkpoints=9)
    errors = run_ranks(train, 2, argv(asked))
    for error in errors:
        assert "could not be written (it needs " in error
        assert "are free); make room there" in error
    steps = sorted(path.name for path in (small_disk / "run" / "checkpoints").iterdir())
    assert steps == [f"step_{number}" for number in range(1, len(steps) + 1)]
    assert len(steps) >= 2
    # With room again (fewer are kept) the same command goes on and ends.
    for name in steps[:-1]:
        shutil.rmtree(small_disk / "run" / "checkpoints" / name)
    run_entry("pretrain", 2, {**asked, "keep_checkpoints": 1})
    assert (small_disk / "run" / "FINISHED").exists()


def kill_while_writing(words: list[str], step: int) -> None:
    """Train; rank 1 is killed in the middle of its file of the checkpoint of `step`."""
    from pipeline.checkpointing import tensor_file

    plain = tensor_file._stream

    def torn(specs: Any, tensors: Any, metadata: Any) -> Any:
        for number, data in enumerate(plain(specs, tensors, metadata)):
            yield data
            if number == 5 and calls == step and os.environ["RANK"] == "1":
                os.kill(os.getpid(), signal.SIGKILL)

    def counted(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        return torn(*args)

    calls = 0
    tensor_file._stream = counted
    train(words)


def test_a_kill_in_the_middle_of_a_file_loses_only_that_checkpoint(
    shards_dir: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    asked = flags(run, shards_dir, checkpoint_every=2)
    with pytest.raises(AssertionError, match="rank 1:\nended without an answer"):
        run_ranks(kill_while_writing, 2, argv(asked), 2)
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == [".step_4.partial", "step_2"]
    run_entry("pretrain", 2, asked)
    lines = records(run, "metrics.jsonl")
    again = {r["step"]: r["loss"] for r in lines if r["attempt"] == 2}
    assert list(again) == [3, 4, 5, 6]
    # The steps that were made before the kill are made again, bit for bit.
    known = {r["step"]: r["loss"] for r in lines if r["attempt"] == 1 and r["step"] > 2}
    assert {step: again[step] for step in known} == known != {}
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == ["BEST.json", "step_4", "step_6"]


def killed_in_step(words: list[str], step: int) -> None:
    """Train with a disk that does not answer; SIGKILL in `step`."""
    import time

    from pipeline import trainer
    from pipeline.checkpointing import writer

    plain = trainer.Trainer._train_step

    def train_step(self: trainer.Trainer) -> Any:
        if self.step == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(self)

    trainer.Trainer._train_step = train_step  # type: ignore[method-assign]
    writer.write_tensors = lambda *_: time.sleep(60)  # type: ignore[assignment,return-value]
    train(words)


def test_kills_before_the_first_checkpoint_is_whole_start_over_each_time(
    shards_dir: Path, tmp_path: Path
) -> None:
    """The second comes when what was left of the first save is gone and no step is made yet."""
    run = tmp_path / "run"
    asked = flags(run, shards_dir, checkpoint_every=2)
    for step in (3, 0):
        with pytest.raises(AssertionError, match="ended without an answer"):
            run_ranks(killed_in_step, 1, argv(asked), step)
    assert list((run / "checkpoints").iterdir()) == []
    # Which would be raised at the next start.
    RunFolder(run).refuse_lost_checkpoints({})

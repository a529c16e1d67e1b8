"""Whole runs on forked ranks: the same numbers as plain PyTorch, on any world, after any stop."""

from __future__ import annotations

import math
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

from tests.distributed.entry import flags, losses, records, run_entry
from tests.distributed.harness import run_ranks
from tests.distributed.parity import Case
from tests.distributed.plain_training import plain
from tools.frontier.run_folder import read_run

pytestmark = pytest.mark.distributed
ARCHITECTURES = ["decllm", "redllm", "entp"]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_zero3_equals_plain_pytorch_on_any_number_of_ranks(
    arch: str, shards_dir: Path, tmp_path: Path
) -> None:
    expected = [point["loss"] for point in plain(Case(arch), shards_dir, 6)]
    ledgers = []
    for world_size, micro_batch in ((1, 12), (2, 6), (2, 2), (3, 4)):
        run = tmp_path / f"{world_size}-{micro_batch}"
        run_entry("pretrain", world_size, flags(run, shards_dir, arch, micro_batch=micro_batch))
        assert list(losses(run).values()) == pytest.approx(expected, rel=1e-5)
        ledgers.append([(r["start"], r["end"], r["hash"]) for r in records(run, "ledger.jsonl")])
    # Every world size sees the same global batches.
    assert all(ledger == ledgers[0] for ledger in ledgers)
    assert len({line[2] for line in ledgers[0]}) == 6


def test_a_run_folder_holds_what_it_promises(shards_dir: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run_entry("pretrain", 2, flags(run, shards_dir, eval_every=2, checkpoint_every=2))
    assert (run / "FINISHED").exists()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
    assert [event.step for event in events.Scalars("validation/loss")] == [2, 4, 6]
    metrics = records(run, "metrics.jsonl")
    assert [r["step"] for r in metrics] == [1, 2, 3, 4, 5, 6]
    assert metrics[-1]["processed_tokens"] == metrics[-1]["loss_tokens"] == 6 * 12 * 16
    assert metrics[-1]["flops_model_causal"] == pytest.approx(6 * metrics[0]["flops_model_causal"])
    last = metrics[-1]
    spent = sum(last[f"{part}_seconds"] for part in ("data", "forward", "backward", "step"))
    assert spent == pytest.approx(last["seconds"], rel=0.1)
    assert min(last["forward_seconds"], last["backward_seconds"], last["rss_bytes"]) > 0
    # What happened beside the loop since the line before: an evaluation, and a checkpoint, whose
    # start and end also take a moment of other steps.
    happened = [False, False, True, False, True, False]
    assert [r["eval_seconds"] > 1e-3 for r in metrics] == happened
    assert all(r["save_seconds"] > 1e-3 for r in metrics if happened[r["step"] - 1])
    assert last["perplexity"] == pytest.approx(math.exp(last["loss"]))
    assert last["skipped_steps"] == 0
    assert set(last["loss_by_source"]) == {"github", "wikipedia"}
    (tag,) = events.Scalars("train/loss_by_source/github")[-1:]
    assert tag.value == pytest.approx(last["loss_by_source"]["github"], rel=1e-6)
    evals = records(run, "eval.jsonl")
    assert [(r["step"], r["final"]) for r in evals] == [(2, False), (4, False), (6, True)]
    assert evals[-1]["loss"] < evals[0]["loss"]
    assert evals[-1]["eval_tokens"] == 10 * 8
    # keep_checkpoints is 2.
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == ["BEST.json", "step_4", "step_6"]
    saved = records(run, "checkpoints.jsonl")
    assert [(r["step"], r["event"]) for r in saved] == [(s, "saved") for s in (2, 4, 6)]


def test_evaluation_is_the_same_on_any_world_and_for_any_cut(
    shards_dir: Path, tmp_path: Path
) -> None:
    """Ten sequences on three ranks: one rank has a row that only fills up."""
    run = tmp_path / "run"
    run_entry("pretrain", 1, flags(run, shards_dir))
    for world_size, micro_batch in ((1, 3), (2, 5), (3, 2)):
        run_entry(
            "evaluate",
            world_size,
            {"run": run, "eval_sequences": 10, "eval_micro_batch": micro_batch},
        )
    first, *others = records(run, "eval.jsonl")
    assert len(others) == 3
    for other in others:
        assert other["loss"] == pytest.approx(first["loss"], rel=1e-6)
        assert other["eval_tokens"] == first["eval_tokens"]
        assert other["unigram_entropy"] == first["unigram_entropy"]


def stop_in_step(argv: list[str], step: int) -> None:
    """Train, and get SIGINT on rank 1 alone while step `step` is under way."""
    import sys

    from pipeline import pretrain, trainer
    from pipeline.assemble import run_stage

    original = trainer.Trainer._backward

    def interrupted(self: trainer.Trainer, *args: object) -> object:
        if self.step == step and self.world.rank == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, *args)  # type: ignore[arg-type]

    trainer.Trainer._backward = interrupted  # type: ignore[assignment,method-assign]
    sys.argv = ["pipeline/pretrain.py", *argv]
    with pytest.raises(SystemExit, match="130"):
        run_stage(pretrain.STAGE)


@pytest.mark.parametrize("arch", ["decllm", "entp"])
def test_a_stopped_run_goes_on_bit_for_bit(arch: str, shards_dir: Path, tmp_path: Path) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    changes = {"model.dropout": 0.1}
    run_entry("pretrain", 2, flags(whole, shards_dir, arch, **changes))
    asked = flags(stopped, shards_dir, arch, **changes)
    run_ranks(stop_in_step, 2, [f"--{key}={value}" for key, value in asked.items()], 2)
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


def stop_in_an_evaluation(argv: list[str]) -> None:
    """Train, and get SIGINT on rank 1 alone when the finished model is to be scored."""
    import sys

    from pipeline import pretrain
    from pipeline.assemble import run_stage
    from pipeline.callbacks import evaluation

    original = evaluation.evaluate

    def interrupted(*args: object) -> object:
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGINT)
        return original(*args)  # type: ignore[arg-type]

    evaluation.evaluate = interrupted  # type: ignore[assignment]
    sys.argv = ["pipeline/pretrain.py", *argv]
    with pytest.raises(SystemExit, match="130"):
        run_stage(pretrain.STAGE)


def test_a_stop_in_the_last_evaluation_is_answered_in_it(shards_dir: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    asked = flags(run, shards_dir, steps=2)
    run_ranks(stop_in_an_evaluation, 2, [f"--{key}={value}" for key, value in asked.items()])
    assert not (run / "FINISHED").exists()
    assert not (run / "eval.jsonl").exists()
    run_entry("pretrain", 2, asked)
    # What was trained is saved, and only scored again.
    assert len(records(run, "metrics.jsonl")) == 2
    assert [(r["final"], r["attempt"]) for r in records(run, "eval.jsonl")] == [(True, 2)]


def test_a_run_goes_on_at_another_world_size(shards_dir: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    run_entry("pretrain", 2, flags(whole, shards_dir, checkpoint_every=2, keep_checkpoints=9))
    for world_size in (1, 3):
        moved = tmp_path / f"on-{world_size}"
        shutil.copytree(whole, moved)
        for step in (4, 6):
            shutil.rmtree(moved / "checkpoints" / f"step_{step}")
        (moved / "FINISHED").unlink()
        run_entry("pretrain", world_size, flags(moved, shards_dir, checkpoint_every=2))
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


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("arch", ["decllm", "redllm"])
def test_finetuning_starts_from_its_parent_and_learns(
    arch: str, shards_dir: Path, flan_dir: Path, tmp_path: Path
) -> None:
    parent, child = tmp_path / "parent", tmp_path / "child"
    run_entry("pretrain", 2, flags(parent, shards_dir, arch))
    changes = {"init_from": parent, "flan": flan_dir, "steps": 12, "schedule": "constant"}
    if arch == "decllm":
        changes["bidirectional_inputs"] = "true"
    run_entry("finetune", 2, flags(child, shards_dir, arch, **changes))
    scored = {(r["eval_set"], r["step"]): r for r in records(child, "eval.jsonl")}
    # The weights it starts from are the parent's: so is their loss on the same held-out tokens.
    own = records(parent, "eval.jsonl")[-1]
    assert scored["validation", 0]["loss"] == pytest.approx(own["loss"], rel=1e-6)
    assert scored["flan_heldout", 12]["loss"] < scored["flan_heldout", 0]["loss"]
    # Its costs are counted on top of its parent's.
    assert scored["validation", 0]["flops_model_causal"] == own["flops_model_causal"]
    assert scored["validation", 12]["flops_model_causal"] > own["flops_model_causal"]


def test_a_run_that_diverges_ends_with_the_cause(shards_dir: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(AssertionError, match="max_skipped_steps=2: that many steps in a row"):
        run_entry("pretrain", 2, flags(run, shards_dir, lr=1e30, max_skipped_steps=2, grad_clip=0))
    skipped = [r["skipped"] for r in records(run, "metrics.jsonl")]
    assert skipped[-2:] == [True, True]
    assert records(run, "metrics.jsonl")[-1]["grad_norm"] is None


def poison_steps(argv: list[str], terms: dict[int, str]) -> None:
    """Train with one of the loss's terms not a number on rank 1 alone in some steps."""
    import sys

    from pipeline import pretrain, trainer
    from pipeline.assemble import run_stage

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
    sys.argv = ["pipeline/pretrain.py", *argv]
    run_stage(pretrain.STAGE)


def test_a_step_that_is_not_finite_on_one_rank_is_skipped_on_all_and_training_goes_on(
    shards_dir: Path, tmp_path: Path
) -> None:
    run, whole = tmp_path / "run", tmp_path / "whole"
    asked = flags(run, shards_dir)
    run_entry("pretrain", 2, flags(whole, shards_dir))
    poisoned = {2: "objective", 4: "nll"}
    run_ranks(poison_steps, 2, [f"--{key}={value}" for key, value in asked.items()], poisoned)
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


def test_uneven_targets_weigh_the_same_on_any_world(
    shards_dir: Path, flan_dir: Path, tmp_path: Path
) -> None:
    """Instruction targets differ in length: a mean of ranks' means would differ from one batch."""
    parent = tmp_path / "parent"
    run_entry("pretrain", 1, flags(parent, shards_dir, steps=1))
    found = []
    for world_size, micro_batch in ((1, 12), (1, 3), (2, 2), (3, 4)):
        run = tmp_path / f"{world_size}-{micro_batch}"
        changes = {"init_from": parent, "flan": flan_dir, "micro_batch": micro_batch}
        run_entry("finetune", world_size, flags(run, shards_dir, **changes))
        last = records(run, "metrics.jsonl")
        found.append([(r["loss"], r["grad_norm"]) for r in last])
        assert last[-1]["flops_hardware"] == pytest.approx(
            records(tmp_path / "1-12", "metrics.jsonl")[-1]["flops_hardware"], rel=1e-12
        )
    for other in found[1:]:
        for ours, first in zip(other, found[0], strict=True):
            assert ours == pytest.approx(first, rel=1e-5)


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


def test_a_swapped_tokenizer_and_a_missing_shard_are_refused_before_any_work(
    shards_dir: Path, tmp_path: Path
) -> None:
    for harm, part in (
        (lambda data: flip_a_bit(data / "tokenizer.model"), "is not the one that made its shards"),
        (lambda data: next(data.glob("train/*/*.tar")).unlink(), "is missing"),
        (lambda data: os.truncate(next(data.glob("train/*/*.tar")), 512), "has 512 bytes"),
    ):
        data = tmp_path / "data"
        shutil.copytree(shards_dir, data)
        harm(data)
        with pytest.raises(AssertionError, match=part):
            run_entry("pretrain", 1, flags(tmp_path / "run", data))
        assert not (tmp_path / "run").exists()
        shutil.rmtree(data)

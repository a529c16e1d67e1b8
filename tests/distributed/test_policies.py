"""Steps that went wrong, on forked ranks: skipped, left out, stopped at; and what verify says."""

from __future__ import annotations

import contextlib
import io
import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.data.shards import CorruptShardError
from pipeline.sources import EndOfData
from tests.distributed.entry import flags, losses, records, run_entry
from tests.distributed.harness import run_ranks
from tests.distributed.test_guards import words
from tests.distributed.test_skipped_steps import poison_steps

pytestmark = pytest.mark.distributed
SPIKE = 11  # the batch whose loss is made one
OPTIMIZERS = ("adafactor", "muon")
SOME = {"steps": 14, "checkpoint_every": 5, "keep_checkpoints": 9, "spike_window": 8}


def prove(run: Path) -> dict[str, Any]:
    """What `isoflop verify` says of a run without a finding."""
    from tools.cli import dispatch

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        dispatch(["verify", str(run), "--workers=1", "--json"])
    told: dict[str, Any] = json.loads(out.getvalue())
    return told


def with_trainer(argv: list[str], change: Callable[..., None], *details: Any) -> None:
    """Train after `change(Trainer, *details)`; finetune where FLAN rows are given."""
    from pipeline import finetune, pretrain, trainer
    from pipeline.assemble import run_stage

    change(trainer.Trainer, *details)
    stage = finetune if any(word.startswith("--flan=") for word in argv) else pretrain
    sys.argv = ["pipeline/pretrain.py", *argv]
    run_stage(stage.STAGE)


def spike_at(trainer: Any, batch: int) -> None:
    """The loss of one batch of the order is told a hundred times too large by rank 1."""
    original = trainer._backward

    def raised(self: Any, *args: Any) -> Any:
        sums = original(self, *args)
        if self.state.positions.batch(self.step) == batch and self.world.rank == 1:
            sums._loss[0] *= 100
        return sums

    trainer._backward = raised


def without_batches(trainer: Any, *batches: int) -> None:
    """As if these batches had never been there."""
    original = trainer.run

    def run(self: Any) -> bool:
        self.state.positions = self.state.positions.without(batches)
        return bool(original(self))

    trainer.run = run


def nan_at(trainer: Any, batches: tuple[int, ...]) -> None:
    """Batches whose gradient is no number, on rank 1 alone."""
    original = trainer._backward

    def poisoned(self: Any, *args: Any) -> Any:
        bad = self.state.positions.batch(self.step) in batches and self.world.rank == 1
        if not bad:
            return original(self, *args)
        model = self.engine.module
        chunks = model.loss_chunks
        model.loss_chunks = lambda *a: (
            terms._replace(objective=terms.objective * math.nan) for terms in chunks(*a)
        )
        try:
            return original(self, *args)
        finally:
            del model.loss_chunks

    trainer._backward = poisoned


def other_on_rank_1(trainer: Any, step: int, place: int = 3) -> None:
    """One bit of one parameter differs on rank 1 after a step."""
    original = trainer._train_step

    def flipped(self: Any) -> Any:
        record = original(self)
        if self.step == step and self.world.rank == 1:
            name, parameter = next(iter(self.engine.module.named_parameters()))
            assert name == "embedding.weight"
            parameter.data.view(-1)[place].view(1).view(torch.uint8)[0] ^= 1
        return record

    trainer._train_step = flipped


def no_batch(trainer: Any, step: int, why: Exception) -> None:
    """Rank 1 has no batch for a step."""
    original = trainer._read

    def read(self: Any) -> Any:
        has_none = self.step == step and self.world.rank == 1
        return why if has_none else original(self)

    trainer._read = read


@pytest.mark.parametrize(
    ("stage", "precision"),
    [
        (3, "fp32"),
        *[pytest.param(stage, "fp32", marks=pytest.mark.soak) for stage in (0, 1, 2)],
        *[pytest.param(stage, "bf16", marks=pytest.mark.soak) for stage in (1, 2, 3)],
    ],
)
def test_a_rollback_leaves_the_batch_out_as_if_it_had_never_been(
    stage: int, precision: str, shards_dir: Path, tmp_path: Path
) -> None:
    run, clean, settings = tmp_path / "run", tmp_path / "clean", tmp_path / "ds.json"
    settings.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    some = {**SOME, "precision": precision, "ds_config": settings}
    asked = words(flags(run, shards_dir, **some, loss_spikes="rollback"))
    run_ranks(with_trainer, 2, asked, spike_at, SPIKE)
    asked = words(flags(clean, shards_dir, **some))
    run_ranks(with_trainer, 2, asked, without_batches, SPIKE)
    # Bit for bit, and undisturbed by the policy before and by the rollback after the spike.
    assert losses(run) == losses(clean)
    made = [(line["step"], line["attempt"]) for line in records(run, "metrics.jsonl")]
    assert made == [*[(s, 1) for s in range(1, 12)], *[(s, 2) for s in range(11, 15)]]
    events = [line["event"] for line in records(run, "ledger.jsonl")]
    assert events == ["applied"] * 11 + ["discarded"] + ["applied"] * 4
    (back,) = [r for r in records(run, "checkpoints.jsonl") if r["event"] == "rolled_back"]
    assert (back["step"], back["from"], back["discarded"]) == (10, 12, [SPIKE])
    told = prove(run)
    assert (told["applied"], told["discarded"], told["samples"]) == (14, 1, 15 * 12)

    # A kill before any checkpoint knows of it, and another number of ranks: the ledger knows.
    shutil.rmtree(run / "checkpoints" / "step_14")
    (run / "FINISHED").unlink()
    run_entry("pretrain", 1, flags(run, shards_dir, **some, loss_spikes="rollback"))
    close = 1e-5 if precision == "fp32" else 2e-3
    assert losses(run) == pytest.approx(losses(clean), rel=close)
    told = prove(run)
    assert (told["attempts"], told["discarded"], told["samples"]) == (3, 1, 15 * 12)


@pytest.mark.parametrize(
    "stage", [0, *[pytest.param(s, marks=pytest.mark.soak) for s in (1, 2, 3)]]
)
def test_at_every_stage_what_is_not_finite_or_a_spike_is_skipped_on_all_ranks(
    stage: int, shards_dir: Path, tmp_path: Path
) -> None:
    settings = tmp_path / "ds.json"
    settings.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    some = {**SOME, "steps": 13, "checkpoint_every": 0, "ds_config": settings}
    run, twice = tmp_path / "run", tmp_path / "twice"
    asked = words(flags(run, shards_dir, **some, loss_spikes="skip"))
    run_ranks(with_trainer, 2, asked, nan_and_spike)
    assert [r["step"] for r in records(run, "metrics.jsonl") if r["skipped"]] == [3, SPIKE + 1]
    # The same as where both gradients were not finite: neither moved anything.
    asked = words(flags(twice, shards_dir, **some))
    run_ranks(poison_steps, 2, asked, {2: "objective", SPIKE: "objective"})
    ours, expected = losses(run), losses(twice)
    assert all(math.isfinite(ours[s]) for s in ours if s != 3)
    differing = {s for s in ours if ours[s] != expected[s]}
    assert differing <= {3, SPIKE + 1}
    assert prove(run)["skipped"] == 2


def nan_and_spike(trainer: Any) -> None:
    nan_at(trainer, (2,))
    spike_at(trainer, SPIKE)


def test_after_a_row_of_skipped_steps_the_run_goes_back_but_not_for_ever(
    shards_dir: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    some = {"steps": 6, "checkpoint_every": 2, "max_skipped_steps": 2, "max_rollbacks": 1}
    asked = words(flags(run, shards_dir, **some, on_nonfinite="rollback"))
    run_ranks(with_trainer, 2, asked, nan_at, (2, 3))
    left_out = [r for r in records(run, "ledger.jsonl") if r["event"] == "discarded"]
    assert [(r["step"], r["start"]) for r in left_out] == [(3, 24), (4, 36)]
    assert prove(run)["samples"] == 8 * 12
    never = tmp_path / "never"
    asked = words(flags(never, shards_dir, **some, on_nonfinite="rollback"))
    with pytest.raises(AssertionError, match="max_rollbacks=1: the run went back to step 2"):
        run_ranks(with_trainer, 2, asked, nan_at, (2, 3, 4, 5))


@pytest.mark.parametrize(
    "some",
    [
        {},
        pytest.param({"stage": 0}, marks=pytest.mark.soak),
        *[
            pytest.param({"stage": stage, **more}, marks=pytest.mark.soak)
            for stage, more in [
                *((stage, {"precision": "bf16"}) for stage in (1, 2, 3)),
                *((stage, {"optimizer": name}) for stage in (1, 3) for name in OPTIMIZERS),
            ]
        ],
    ],
)
def test_before_the_first_checkpoint_a_run_goes_back_to_its_start(
    some: dict[str, Any], shards_dir: Path, tmp_path: Path
) -> None:
    run, clean, settings = tmp_path / "run", tmp_path / "clean", tmp_path / "ds.json"
    some = {"steps": 5, "checkpoint_every": 20, "max_skipped_steps": 2, **some}
    settings.write_text(json.dumps({"zero_optimization": {"stage": some.pop("stage", 3)}}))
    asked = words(flags(run, shards_dir, ds_config=settings, on_nonfinite="rollback", **some))
    run_ranks(with_trainer, 2, asked, nan_at, (2, 3))
    asked = words(flags(clean, shards_dir, ds_config=settings, **some))
    run_ranks(with_trainer, 2, asked, without_batches, 2, 3)
    # Two steps had moved every weight and filled the optimizer's states.
    assert losses(run) == losses(clean)
    (back,) = [r for r in records(run, "checkpoints.jsonl") if r["event"] == "rolled_back"]
    assert (back["step"], back["from"], back["discarded"]) == (0, 4, [2, 3])
    told = prove(run)
    assert (told["applied"], told["discarded"], told["samples"]) == (5, 2, 7 * 12)


def test_ranks_that_hold_different_parameters_end_the_run(shards_dir: Path, tmp_path: Path) -> None:
    asked = flags(tmp_path / "run", shards_dir, check_ranks_every=2, ds_config=tmp_path / "ds.json")
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 2}}')
    told = (
        "check_ranks_every=2: after step 4 rank\\(s\\) 1 hold other values than the rest of "
        "embedding.weight"
    )
    with pytest.raises(AssertionError, match=told):
        run_ranks(with_trainer, 3, words(asked), other_on_rank_1, 4)
    run_entry("pretrain", 2, {**flags(tmp_path / "cut", shards_dir), "check_ranks_every": 2})


@pytest.mark.parametrize(
    ("stage", "precision", "place"),
    [
        (3, "fp32", 3),  # in what rank 0 owns
        *[
            pytest.param(*case, marks=pytest.mark.soak)
            for case in [(3, "fp32", -1), (3, "bf16", -1), (2, "fp32", 3), (1, "bf16", -1)]
        ],
    ],
)
def test_of_two_that_disagree_the_one_is_named_that_the_owners_of_the_parts_contradict(
    stage: int, precision: str, place: int, shards_dir: Path, tmp_path: Path
) -> None:
    """Among two ranks there is no majority."""
    settings = tmp_path / "ds.json"
    settings.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    asked = flags(tmp_path / "run", shards_dir, precision=precision, ds_config=settings)
    told = (
        "check_ranks_every=2: after step 4 rank\\(s\\) 1 hold other values than those that own the "
        "parts of embedding.weight"
    )
    with pytest.raises(AssertionError, match=told):
        run_ranks(
            with_trainer, 2, [*words(asked), "--check_ranks_every=2"], other_on_rank_1, 4, place
        )


BLOCK = CorruptShardError("shard x.tar: block 3 is not what was written")


@pytest.mark.parametrize(
    ("why", "kinds"),
    [
        (BLOCK, ["UserError 2", "UserError 2"]),
        # A disk may answer the next time.
        pytest.param(OSError("the disk"), ["Fault 1", "Fault 1"], marks=pytest.mark.soak),
        # Nobody thought of it: its own rank shows where.
        pytest.param(KeyError("x"), ["Fault 1", "KeyError"], marks=pytest.mark.soak),
    ],
)
def test_a_rank_that_cannot_read_its_batch_ends_all_with_one_line(
    why: Exception, kinds: list[str], shards_dir: Path, tmp_path: Path
) -> None:
    asked = words(flags(tmp_path / "run", shards_dir))
    told = run_ranks(told_by_each, 2, asked, why)
    assert [kind for kind, _ in told] == kinds
    assert told[0][1] == f"rank 1: {why}"
    assert kinds[1] == "KeyError" or told[1] == told[0]


def told_by_each(argv: list[str], why: Exception) -> tuple[str, str]:
    """What each rank ends with: the error's kind with its exit code, and its text."""
    try:
        with_trainer(argv, no_batch, 2, why)
    except Exception as error:
        return f"{type(error).__name__} {getattr(error, 'exit_code', '')}".strip(), str(error)
    raise AssertionError("nothing ended it")


def test_a_source_that_ends_on_one_rank_ends_the_run_on_all(
    shards_dir: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    asked = words(flags(run, shards_dir))
    run_ranks(with_trainer, 2, asked, no_batch, 2, EndOfData("no more rows"))
    assert json.loads((run / "FINISHED").read_text()) == {"step": 2, "reason": "no more rows"}
    assert (run / "checkpoints" / "step_2" / "COMPLETE.json").exists()


def test_data_that_end_end_the_run_and_finish_it(shards_dir: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    asked = flags(run, shards_dir, max_epochs=0.001)
    run_entry("pretrain", 2, asked)
    finished = json.loads((run / "FINISHED").read_text())
    steps = len(records(run, "metrics.jsonl"))
    assert finished["step"] == steps == 3
    assert finished["reason"].startswith("max_epochs=0.001: ")
    assert (run / "checkpoints" / "step_3" / "COMPLETE.json").exists()
    assert records(run, "eval.jsonl")[-1]["final"]
    assert prove(run)["steps"] == 3

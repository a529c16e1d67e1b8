"""Finetuning runs on forked ranks: they start from their parent, and uneven targets weigh alike."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.entry import argv, flags, losses, records, run_entry
from tests.distributed.harness import run_ranks
from tests.distributed.test_policies import nan_at, with_trainer, without_batches

pytestmark = pytest.mark.distributed


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


@pytest.mark.soak
def test_one_that_goes_bad_at_once_goes_back_to_its_parents_weights(
    shards_dir: Path, flan_dir: Path, tmp_path: Path
) -> None:
    parent, run, clean = tmp_path / "parent", tmp_path / "run", tmp_path / "clean"
    run_entry("pretrain", 2, flags(parent, shards_dir))
    changes = {"init_from": parent, "flan": flan_dir, "steps": 5, "max_skipped_steps": 2}
    changes["checkpoint_every"] = 20
    asked = argv(flags(run, shards_dir, on_nonfinite="rollback", **changes))
    run_ranks(with_trainer, 2, asked, nan_at, (2, 3))
    run_ranks(with_trainer, 2, argv(flags(clean, shards_dir, **changes)), without_batches, 2, 3)
    assert losses(run) == losses(clean)
    last, expected = (records(each, "metrics.jsonl")[-1] for each in (run, clean))
    assert last["flops_model_causal"] == expected["flops_model_causal"]

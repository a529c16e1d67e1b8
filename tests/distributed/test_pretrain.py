"""Whole runs on forked ranks: the numbers of plain PyTorch on any world, and what a run leaves."""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from pipeline.run_folder import RunFolder
from tests.distributed.entry import argv, flags, flip_a_bit, losses, records, run_entry, train
from tests.distributed.harness import run_ranks
from tests.distributed.parity import Case
from tests.distributed.plain_training import plain

pytestmark = pytest.mark.distributed
PEAK = 1e8  # FLOP/s
# What every line of metrics.jsonl says; the conventions of FLOPs by their names.
METRICS = {
    *("step", "attempt", "loss", "z_loss", "perplexity", "loss_by_source", "grad_norm", "lr"),
    *("loss_tokens", "processed_tokens", "tokens_per_second", "tokens_per_second_per_device"),
    *(f"flops_{name}" for name in ("6n", "model_causal", "model_full", "hardware")),
    *(f"{part}_seconds" for part in ("data", "forward", "backward", "step", "save", "eval")),
    *("seconds", "mfu", "rss_bytes", "skipped", "skipped_steps"),
}


def test_every_number_of_ranks_sees_the_same_batches_and_gives_plain_pytorchs_losses(
    shards_dir: Path, tmp_path: Path
) -> None:
    expected = [point["loss"] for point in plain(Case(), shards_dir, 4)]
    ledgers = []
    for world_size, micro_batch in ((1, 12), (2, 2), (3, 4)):
        run = tmp_path / f"{world_size}-{micro_batch}"
        run_entry("pretrain", world_size, flags(run, shards_dir, micro_batch=micro_batch, steps=4))
        assert list(losses(run).values()) == pytest.approx(expected, rel=1e-5)
        ledgers.append([(r["start"], r["end"], r["hash"]) for r in records(run, "ledger.jsonl")])
    assert all(ledger == ledgers[0] for ledger in ledgers)
    assert len({line[2] for line in ledgers[0]}) == 4


def at_a_peak(words: list[str], peak: float) -> str:
    """Train on this rank, a device that reaches `peak` FLOP/s."""
    from pipeline.callbacks import records

    records.dense_peak = lambda *_: peak
    return train(words)


def test_a_run_folder_holds_what_it_promises(shards_dir: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    changes = {"checkpoint_every": 2, "keep_checkpoints": 1, "keep_every": 3}
    changes |= {
        "log_spaced_checkpoints": 1,
        "eval_every": 2,
        "model.activation_checkpointing": "true",
    }
    asked = flags(run, shards_dir, **changes)
    assert run_ranks(at_a_peak, 2, argv(asked), PEAK) == ["", ""]
    assert (run / "FINISHED").exists()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
    assert [event.step for event in events.Scalars("validation/loss")] == [2, 4, 6]
    metrics = records(run, "metrics.jsonl")
    assert all(r.keys() >= METRICS for r in metrics)
    assert [r["step"] for r in metrics] == [1, 2, 3, 4, 5, 6]
    check_rates_and_counts(RunFolder(run), metrics)
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
    # The last and best one, those of every third step, and one for each factor of ten of steps.
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == ["BEST.json", "step_1", "step_3", "step_6"]
    saved = records(run, "checkpoints.jsonl")
    assert [(r["step"], r["event"]) for r in saved] == [(s, "saved") for s in (1, 2, 3, 4, 6)]


def check_rates_and_counts(folder: RunFolder, metrics: list[dict[str, Any]]) -> None:
    """Of a run of `flags` on two ranks at PEAK: what a line says of its step and of all so far."""
    from models.config import ModelConfig
    from models.flops import training_flops

    document = folder.read_config()
    sequence = training_flops(ModelConfig(**document["model"]), seq_len=16)
    each = {
        "6n": 6 * document["parameters"]["non_embedding"] * 16,
        "model_causal": sequence.model_causal,
        "model_full": sequence.model_full,
        "hardware": sequence.hardware,
    }
    assert len(set(each.values())) == 4
    for line in metrics:
        step, seconds = line["step"], line["seconds"]
        for name, flops in each.items():
            assert line[f"flops_{name}"] == pytest.approx(step * 12 * flops)
        assert line["processed_tokens"] == line["loss_tokens"] == step * 12 * 16
        # seconds are written to the microsecond.
        assert line["tokens_per_second"] == pytest.approx(12 * 16 / seconds, rel=1e-3)
        assert line["tokens_per_second_per_device"] == pytest.approx(6 * 16 / seconds, rel=1e-3)
        share = 12 * sequence.model_causal / seconds / (2 * PEAK)
        assert line["mfu"] == pytest.approx(share, rel=1e-3)
        # From its peak by half a cosine to a tenth of it.
        height = (1 + math.cos(math.pi * (step - 1) / 5)) / 2
        assert line["lr"] == pytest.approx(0.01 * (0.1 + 0.9 * height))


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

"""Runs the entry points on forked ranks, and reads what they wrote."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tests.distributed.harness import run_ranks


def run_entry(entry: str, world_size: int, flags: dict[str, Any]) -> None:
    """`pipeline/ENTRY.py --key=value …` on `world_size` ranks."""
    run_ranks(_entry, world_size, entry, argv(flags))


def _entry(entry: str, argv: list[str]) -> None:
    sys.argv = [f"pipeline/{entry}.py", *argv]
    if entry == "evaluate":
        from pipeline.evaluate import main

        main()
        return
    from pipeline import finetune, pretrain
    from pipeline.assemble import run_stage

    run_stage({"pretrain": pretrain.STAGE, "finetune": finetune.STAGE}[entry])


def records(run: Path, name: str) -> list[dict[str, Any]]:
    """The lines of one of a run's .jsonl files."""
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


def losses(run: Path) -> dict[int, float]:
    """Loss by step; the last attempt wins."""
    return {record["step"]: record["loss"] for record in records(run, "metrics.jsonl")}


def flags(run: Path, shards: Path, arch: str = "decllm", **changes: Any) -> dict[str, Any]:
    """A tiny pretraining run."""
    return {
        "run_dir": run,
        "data": shards,
        "arch": arch,
        "size": "nano",
        "seq_len": 16,
        "steps": 6,
        "global_batch": 12,
        "lr": 0.01,
        "precision": "fp32",
        "ds_config": "ds_configs/cpu.json",
        "eval_sequences": 10,
        "threads": 1,
        **changes,
    }


def argv(asked: dict[str, Any]) -> list[str]:
    """The command line of what is asked."""
    return [f"--{key}={value}" for key, value in asked.items()]


def train(words: list[str]) -> str:
    """Pretraining on this rank with the command line `words`; the error it ended with, or ""."""
    from pipeline.options import UserError

    try:
        _entry("pretrain", words)
    except UserError as error:
        return str(error)
    return ""


def flip_a_bit(file: Path) -> None:
    """Damage the middle of a file."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)

"""Running out of memory: which errors mean it, and what the line says."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config import RunConfig
from pipeline.guards.attempt import Guards
from pipeline.guards.memory import Held, advice, asked_bytes, held_here, is_out_of_memory
from pipeline.options import load
from pipeline.run_folder import RunFolder
from tests.distributed.entry import flags


def config(**changes: Any) -> RunConfig:
    asked = flags(Path("run"), Path("shards"), **changes)
    return load(RunConfig, {key: str(value) for key, value in asked.items()})


def test_what_torch_itself_says_without_memory_is_understood() -> None:
    """More than any address space holds: no machine has it."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert held_here(caught.value).asked == 2**50
    with pytest.raises(MemoryError) as plain:
        bytearray(2**60)
    assert is_out_of_memory(plain.value)
    assert held_here(plain.value).process > 1e6


def test_other_errors_are_not_taken_for_it() -> None:
    assert is_out_of_memory(OSError(errno.ENOMEM, "Cannot allocate memory"))
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert not is_out_of_memory(OSError(errno.ENOSPC, "No space left on device"))
    assert not is_out_of_memory(RuntimeError("Connection closed by peer"))
    assert not is_out_of_memory(ValueError("out of memory"))


def test_sizes_are_read_from_both_allocators_words() -> None:
    assert asked_bytes("CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0 has") == 3 * 2**29
    assert asked_bytes("DefaultCPUAllocator: not enough memory: you tried to allocate 7 bytes") == 7
    assert asked_bytes("MemoryError") == 0


def test_the_line_says_what_was_held_and_only_what_can_be_changed(tmp_path: Path) -> None:
    held = Held(asked=2 * 10**9, process=20 * 10**9, machine=24 * 10**9)
    told = advice(config(), 2, held, "phase backward of step 3")
    assert told.startswith(
        "out of memory in phase backward of step 3: 2.00 GB were asked for; the process held "
        "20.00 GB of 24.00 GB; try, in this order: --micro_batch=3 (now 6 sequences at once); "
        "--model.activation_checkpointing=true; "
    )
    assert "ZeRO stage" not in told
    settings = tmp_path / "ds.json"
    offload = {"stage": 1, "offload_optimizer": {"device": "cpu"}}
    settings.write_text(json.dumps({"zero_optimization": offload}))
    small = {"micro_batch": 1, "model.activation_checkpointing": "true", "ds_config": settings}
    told = advice(config(**small), 2, held, "phase forward of step 1")
    assert "micro_batch" not in told
    assert "activation_checkpointing" not in told
    assert "a higher ZeRO stage than 1" in told
    assert "offload" not in told
    assert "more ranks than 2; less than seq_len=16, in another run_dir" in told


def test_a_save_that_finds_no_room_for_its_copy_is_told_so() -> None:
    held = Held(asked=0, process=1, machine=2)
    told = advice(config(), 2, held, "phase save of step 3")
    assert "try, in this order: --async_checkpoints=false" in told
    told = advice(config(async_checkpoints=False), 2, held, "phase save of step 3")
    assert "async_checkpoints" not in told


@pytest.mark.parametrize(("steps", "code"), [(1, 2), (2, 1)])
def test_once_steps_fitted_another_start_may_fit_again(
    steps: int, code: int, tmp_path: Path
) -> None:
    guards = Guards(config(), RunFolder(tmp_path))
    for step in range(steps):
        guards.heart.begin_step(step, "forward")
    told = guards.explain(MemoryError(), config())
    assert told is not None
    assert told.exit_code == code

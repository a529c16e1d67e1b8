"""Joining the other ranks."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from tests.distributed.entry import argv, flags, train
from tests.distributed.harness import run_ranks

pytestmark = pytest.mark.distributed


def _timeouts() -> tuple[float, float]:
    import deepspeed
    import torch
    import torch.distributed as dist

    from pipeline import distributed

    distributed.start(timeout_seconds=77, threads=1)
    cpu, groups = torch.device("cpu"), (dist.group.WORLD, deepspeed.comm.new_group([0]))
    whole, made = (group._get_backend(cpu).options._timeout.total_seconds() for group in groups)
    return whole, made


def test_deepspeeds_own_groups_have_the_runs_timeout() -> None:
    assert run_ranks(_timeouts, 1) == [(77, 77)]


def _train_at(words: list[str], port: int) -> str:
    """Train with the launcher's port said to be `port`; the error, or ""."""
    os.environ["MASTER_PORT"] = str(port)
    return train(words)


@pytest.mark.parametrize(
    ("ranks", "told"),
    [
        # Nobody has to find it.
        (1, [""]),
        pytest.param(2, ["cannot listen there (", "did not answer"], marks=pytest.mark.soak),
    ],
)
def test_a_port_that_is_taken_is_one_line_and_nothing_to_a_rank_alone(
    ranks: int, told: list[str], shards_dir: Path, tmp_path: Path
) -> None:
    asked = argv(flags(tmp_path / "run", shards_dir, steps=1, start_timeout=2))
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        ends = run_ranks(_train_at, ranks, asked, port)
    for part, end in zip(told, ends, strict=True):
        assert part in end
        assert bool(part) == bool(end) == (f"MASTER_PORT={port}" in end)

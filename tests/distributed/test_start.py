"""Joining the other ranks."""

from __future__ import annotations

import pytest

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

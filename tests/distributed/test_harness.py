"""Forked ranks find everything imported: their start is milliseconds instead of seconds."""

from __future__ import annotations

import sys

import pytest

from tests.distributed.harness import run_ranks

pytestmark = pytest.mark.distributed


def imported_by_a_start() -> tuple[bool, list[str]]:
    """On this rank: whether the fork server had imported all it should, and torch's compiler."""
    from pipeline import distributed

    before = "tests.distributed.preload" in sys.modules
    distributed.start(timeout_seconds=60, threads=1)
    import deepspeed.runtime.zero.utils as zero
    import torch

    # What building any engine asks: is this DeepSpeed's Muon?
    zero.is_zero_supported_optimizer(torch.optim.SGD([torch.zeros(1)]))
    return before, [name for name in sys.modules if name == "torch._inductor.compile_fx"]


def test_a_rank_starts_without_importing_and_without_torchs_compiler() -> None:
    assert run_ranks(imported_by_a_start, 1) == [(True, [])]

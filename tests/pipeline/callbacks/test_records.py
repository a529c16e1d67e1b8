"""TensorBoard's files, where there is no room for them."""

from __future__ import annotations

import errno
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.utils.tensorboard

from pipeline.callbacks.records import Metrics


def test_a_full_disk_at_a_rollback_ends_no_run_on_rank_0_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[str] = []
    trainer: Any = SimpleNamespace(
        world=SimpleNamespace(is_main=True),
        folder=SimpleNamespace(path=Path("run")),
        step=5,
        say=told.append,
    )
    metrics = Metrics()
    metrics._writer = SimpleNamespace(close=lambda: None)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch.utils.tensorboard, "SummaryWriter", full)
    metrics.on_rolled_back(trainer)
    metrics.on_end(trainer)
    assert len(told) == 1
    assert "run/tensorboard: cannot be written (No space left on device)" in told[0]

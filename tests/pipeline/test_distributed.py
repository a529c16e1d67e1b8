"""DeepSpeed's chatter is silenced, its warnings are not."""

from __future__ import annotations

import logging
import warnings

import pytest
import torch

from pipeline import distributed, zero_layout
from pipeline.optim.shard import Shard
from pipeline.zero_layout import Fragment


def test_noise_is_dropped_and_warnings_are_kept(capsys: pytest.CaptureFixture[str]) -> None:
    from deepspeed.runtime import bf16_optimizer
    from deepspeed.utils import logger

    heard: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            heard.append(record.getMessage())

    before = logger.level, list(logger.filters), bf16_optimizer.see_memory_usage
    listener = Listener()
    logger.addHandler(listener)
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            distributed._quieten()
            warnings.warn("Dynamo detected a call to a `functools.lru_cache`-wrapped", stacklevel=1)
            warnings.warn("Dynamo detected something else", stacklevel=1)
        logger.info("Creating an optimizer")
        logger.warning("**** You are using ZeRO with an untested optimizer, proceed with caution")
        logger.warning("%s is not what it was", "the loss scale")
        logger.error("rank %d is gone", 3)
        bf16_optimizer.see_memory_usage("begin bf16_optimizer", force=True)
    finally:
        logger.removeHandler(listener)
        logger.setLevel(before[0])
        logger.filters[:] = before[1]
        bf16_optimizer.see_memory_usage = before[2]
    assert [str(each.message) for each in warned] == ["Dynamo detected something else"]
    assert heard == ["the loss scale is not what it was", "rank 3 is gone"]
    assert "optimizer" not in capsys.readouterr().out


def test_what_is_in_host_memory_is_summed_by_way_of_the_gpu(monkeypatch) -> None:
    """NCCL knows no other tensors; with a second rank that holds the same."""
    on_gpu: list[torch.Tensor] = []

    def cuda(self: torch.Tensor) -> torch.Tensor:
        on_gpu.append(self.clone())
        return on_gpu[-1]

    def all_reduce(tensor: torch.Tensor, op: object = None) -> None:
        assert any(tensor is moved for moved in on_gpu)
        tensor.mul_(2)

    monkeypatch.setattr(torch.Tensor, "cuda", cuda)
    monkeypatch.setattr(distributed.dist, "get_backend", lambda: "nccl")
    monkeypatch.setattr(distributed.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(distributed.dist, "all_reduce", all_reduce)
    assert distributed.sum_over_ranks(torch.ones(3)).tolist() == [2, 2, 2]
    assert distributed.all_agree(True)
    assert not distributed.all_agree(False)
    offloaded = Fragment("w", torch.Size((2,)), torch.ones(1), 0, 0, 1)
    Shard([offloaded], None).sum_over_ranks(values := torch.ones(2))
    assert values.tolist() == [2, 2]
    # The places 0 and 0: not those of both elements.
    with pytest.raises(RuntimeError, match="the ranks hold 2 of 2 of w"):
        zero_layout.check_cover([offloaded])
    assert len(on_gpu) == 5

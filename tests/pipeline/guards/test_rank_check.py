"""Hashes that see one changed bit, and who is outvoted."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.guards import rank_check
from pipeline.guards.rank_check import minority, tensor_hash
from tests.pipeline.guards.test_verdict import config, record


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.uint8])
def test_any_flipped_bit_changes_the_hash(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    tensor = torch.rand(7, 11, generator=generator).mul(200).to(dtype)
    before = tensor_hash(tensor)
    assert tensor_hash(tensor.clone()) == before
    raw = tensor.view(torch.uint8).view(-1)
    for place in range(raw.numel()):
        for bit in (1, 128):
            raw[place] ^= bit
            assert tensor_hash(tensor) != before
            raw[place] ^= bit
    assert tensor_hash(tensor) == before


def test_values_that_change_places_change_the_hash_and_chunks_do_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tensor = torch.arange(1000.0)
    before = tensor_hash(tensor)
    assert tensor_hash(tensor.flip(0)) != before
    assert tensor_hash(tensor.view(10, 100).T.contiguous().T) == before
    monkeypatch.setattr(rank_check, "_CHUNK", 64)
    assert tensor_hash(tensor) == before
    assert tensor_hash(torch.zeros(0)) == 0
    parts = tensor_hash(tensor[:301]) + tensor_hash(tensor[301:], 301)
    assert (parts - before) % 2**64 == 0


@given(st.lists(st.integers(0, 2), min_size=2, max_size=9))
def test_the_outvoted_are_named_or_all(hashes: list[int]) -> None:
    found = minority(hashes)
    counts = sorted((hashes.count(value) for value in set(hashes)), reverse=True)
    if len(counts) == 1:
        assert found == []
    elif counts[0] == counts[1]:
        assert found == list(range(len(hashes)))
    else:
        assert len(found) == len(hashes) - counts[0]
        assert len({hashes[rank] for rank in range(len(hashes)) if rank not in found}) == 1


@pytest.mark.parametrize(
    ("stage", "every", "expected"),
    [(2, 4, [4, 5, 8, 10, 11]), (3, 4, [4, 8]), (0, 100, [5, 10, 11]), (0, 0, [])],
)
def test_ranks_are_compared_before_their_parts_are_saved_together(
    stage: int, every: int, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint between two comparisons would hold what one rank alone has."""
    compared = []
    trainer: Any = SimpleNamespace(
        config=config(check_ranks_every=every, checkpoint_every=5),
        world=SimpleNamespace(size=2, device=None),
        engine=SimpleNamespace(zero_optimization_stage=lambda: stage),
        step=0,
    )
    monkeypatch.setattr(rank_check, "local_hashes", lambda _: compared.append(trainer.step))
    monkeypatch.setattr(rank_check, "disagreements", lambda *_: {})
    check = rank_check.RankCheck()
    for trainer.step in range(1, 12):
        check.on_step(trainer, record(trainer.step))
    check.on_end(trainer)
    check.on_stop(trainer)
    assert compared == expected
    # The steps that are made again after a rollback are others.
    check.on_rolled_back(trainer)
    check.on_end(trainer)
    assert compared == [*expected, *expected[-1:]] if stage < 3 else expected

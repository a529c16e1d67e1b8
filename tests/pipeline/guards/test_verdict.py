"""What follows from a step that was skipped or whose loss is a spike, under every policy."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from pipeline.callbacks.base import StepRecord
from pipeline.config import RunConfig
from pipeline.guards.verdict import judge
from pipeline.options import UserError, load
from pipeline.run_state import RunState
from tests.distributed.entry import flags


def config(**changes: Any) -> RunConfig:
    asked = flags(Path("run"), Path("shards"), **{"checkpoint_every": 5, **changes})
    return load(RunConfig, {key: str(value) for key, value in asked.items()})


def record(step: int, *, applied: bool = True, is_spike: bool = False) -> StepRecord:
    return StepRecord(
        step=step,
        loss=9.0,
        z_loss=0.0,
        grad_norm=1.0,
        lr=0.1,
        seconds=0.5,
        step_tokens=1,
        step_flops=1.0,
        applied=applied,
        positions=(step * 12 - 12, step * 12),
        sample_hash=0,
        times={},
        loss_by_source={},
        is_spike=is_spike,
    )


@pytest.mark.parametrize("policy", ["stop", "rollback"])
@pytest.mark.parametrize("count", [1, 3])
def test_a_row_of_skipped_steps_is_judged_at_its_end(policy: str, count: int) -> None:
    asked = config(max_skipped_steps=count, on_nonfinite=policy)
    row = [record(step, applied=False) for step in range(5, 5 + count)]
    for made in range(1, count + 1):
        state = dataclasses.replace(RunState.of(asked), skipped_in_a_row=made)
        verdict = judge(asked, state, row[made - 1], row[:made])
        assert verdict.action == ("go_on" if made < count else policy)
    assert f"max_skipped_steps={count}" in verdict.reason
    assert verdict.records == (tuple(row) if policy == "rollback" else ())


@pytest.mark.parametrize("policy", ["skip", "stop", "rollback"])
def test_a_spike_is_judged_by_its_policy(policy: str) -> None:
    asked = config(loss_spikes=policy, spike_window=8)
    state = RunState.of(asked, {"losses": [2.0] * 8})
    # A spike that is to be skipped was not applied.
    found = record(7, applied=policy != "skip", is_spike=True)
    verdict = judge(asked, state, found, [])
    assert verdict.action == {"skip": "go_on"}.get(policy, policy)
    assert verdict.records == ((found,) if policy == "rollback" else ())
    if policy != "skip":
        assert "its loss 9.0000 lies" in verdict.reason


def test_a_row_of_spikes_may_be_other_data() -> None:
    asked = config(loss_spikes="skip", max_skipped_steps=1)
    state = dataclasses.replace(RunState.of(asked), skipped_in_a_row=1)
    for is_spike in (True, False):
        told = judge(asked, state, record(7, applied=False, is_spike=is_spike), []).reason
        assert ("raise spike_threshold=8" in told) == is_spike
        assert "lower lr=0.01" in told


@pytest.mark.parametrize("policy", ["loss_spikes", "on_nonfinite"])
def test_a_run_that_keeps_nothing_cannot_go_back(policy: str) -> None:
    with pytest.raises(UserError, match=f"{policy}='rollback': .*give --checkpoint_every"):
        config(checkpoint_every=0, **{policy: "rollback"})
    config(checkpoint_every=0, keep_every=5, **{policy: "rollback"})


def test_a_step_as_any_other_goes_on() -> None:
    assert judge(config(), RunState.of(config()), record(7), []).action == "go_on"


def test_the_state_comes_back_as_it_was_kept() -> None:
    asked = config(loss_spikes="rollback", spike_window=8)
    state = RunState.of(asked, {"losses": [2.0, 1.0 / 3.0], "discarded": [7, 3], "step": 9})
    state.totals.add(5, 6, (1.0, 2.0, 3.0, 4.0))
    kept = state.as_record()
    assert kept["discarded"] == [3, 7]
    assert RunState.of(asked, kept).as_record() == kept
    # Where nobody asks for spikes nothing is kept of losses.
    assert RunState.of(config(), kept).as_record()["losses"] == []

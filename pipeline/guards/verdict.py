"""What is done about a step that went wrong: a pure function of the run's policies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pipeline.callbacks.base import StepRecord
from pipeline.config import RunConfig
from pipeline.run_state import RunState


@dataclass(frozen=True)
class Verdict:
    """What follows from a step.

    Attributes:
        action: go_on (a skipped step included), stop, or rollback.
        reason: in words; "" where the run goes on.
        records: the steps that a rollback leaves out.
    """

    action: Literal["go_on", "stop", "rollback"] = "go_on"
    reason: str = ""
    records: tuple[StepRecord, ...] = ()


def judge(
    config: RunConfig, state: RunState, record: StepRecord, skipped: Sequence[StepRecord]
) -> Verdict:
    """What is done after the step `record`.

    Args:
        state: after the step; its spikes have not seen the step's loss.
        skipped: the steps without a break up to this one that were skipped, as far as this attempt
            made them.
    """
    if record.is_spike and record.applied:
        policy = config.loss_spikes
        reason = f"step {record.step}: {state.spikes.describe(record.loss)}"
        if policy == "rollback":
            return Verdict("rollback", reason, (record,))
        if policy == "stop":
            remedy = (
                "give --loss_spikes=rollback to leave its batch out, or lower "
                f"lr={config.lr} in another run_dir"
            )
            return Verdict("stop", f"loss_spikes='stop': {reason}; {remedy}")
    if not record.applied and state.skipped_in_a_row >= config.max_skipped_steps:
        reason = (
            f"max_skipped_steps={config.max_skipped_steps}: that many steps in a row were not "
            f"finite or spikes, up to step {record.step}"
        )
        if config.on_nonfinite == "rollback":
            return Verdict("rollback", reason, tuple(skipped))
        remedy = f"lower lr={config.lr} in another run_dir"
        if record.is_spike:
            remedy = (
                f"raise spike_threshold={config.spike_threshold:g} where the data change, or lower "
                f"lr={config.lr}"
            )
        return Verdict("stop", f"{reason}; {remedy}")
    return Verdict()

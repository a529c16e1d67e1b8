"""Back to the newest whole checkpoint in the running process, and past what did harm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipeline import checkpoint
from pipeline.distributed import same_everywhere
from pipeline.options import UserError
from pipeline.run_state import RunState

if TYPE_CHECKING:
    from pipeline.callbacks.base import StepRecord
    from pipeline.trainer import Trainer


def roll_back(trainer: Trainer, records: Sequence[StepRecord], reason: str) -> None:
    """Load the newest whole checkpoint and discard the batches of `records`; a collective.

    What was discarded is in the ledger before anything else happens: a kill at any moment finds it
    there. Batches of steps that the checkpoint already counts are past anyway.

    Raises:
        UserError: there is none, or the run went back to it `max_rollbacks` times before.
    """
    trainer.notify("on_rollback")
    config, folder, world = trainer.config, trainer.folder, trainer.world
    # Every file of the checkpoint is hashed, and read: as long as a start.
    trainer.heart.begin("load")
    found = checkpoint.newest_good(folder.checkpoints, world)
    if found is None:
        raise UserError(
            f"{reason}; there is no checkpoint to go back to: lower lr={config.lr} in "
            "another run_dir, or save earlier"
        )
    record = checkpoint.read_state(found)
    back = int(record["step"])
    before = same_everywhere(folder.rollbacks() if world.is_main else None)
    if before >= config.max_rollbacks:
        raise UserError(
            f"{reason}; max_rollbacks={config.max_rollbacks}: the run went back to step {back} "
            f"that many times; lower lr={config.lr} in another run_dir"
        )
    left_out = [each for each in records if each.step > back]
    for each in left_out:
        trainer.notify("on_discard", each)
    batches = [each.positions[0] // config.global_batch for each in left_out]
    positions = trainer.state.positions.without(batches)
    if world.is_main:
        line = {"step": back, "attempt": trainer.attempt, "event": "rolled_back"}
        told = {"from": records[-1].step, "reason": reason, "discarded": batches}
        folder.note("checkpoints.jsonl", {**line, **told})
    trainer.heart.begin("load")  # what was discarded was told to callbacks in phases of theirs
    checkpoint.load(trainer.engine, found, world)
    trainer.state = RunState.of(config, record)
    trainer.state.positions = positions.without(trainer.state.positions.discarded)
    trainer.state.skipped_in_a_row = 0
    trainer.attempt += 1
    trainer.heart.attempt = trainer.attempt
    trainer.notify("on_rolled_back")
    trainer.say(
        f"{reason}; back to the checkpoint of step {back}, without batch "
        f"{', '.join(map(str, batches)) or 'none'} ({before + 1} of at most {config.max_rollbacks})"
    )

"""Back to the newest whole checkpoint, or to the start, and past what did harm; in one process."""

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

    Before the first checkpoint it is the run's start that the run goes back to.

    What was discarded is in the ledger before anything else happens: a kill at any moment finds it
    there. Batches of steps that the checkpoint already counts are past anyway.

    Raises:
        UserError: those there were are gone, or the run went back `max_rollbacks` times before.
    """
    trainer.notify("on_rollback")
    config, folder, world = trainer.config, trainer.folder, trainer.world
    # Every file of the checkpoint is hashed, and read: as long as a start.
    trainer.heart.begin("load")
    found = checkpoint.newest_good(folder.checkpoints, world)
    start = trainer.start
    if found is None and (start is None or _had_checkpoints(trainer)):
        raise UserError(
            f"{reason}; the checkpoint to go back to is gone: restore one in {folder.checkpoints}"
        )
    back = int(checkpoint.read_state(found)["step"]) if found else 0
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
    if found is not None:
        record = checkpoint.load(trainer.engine, found, world)
    else:
        record = trainer.return_to_start()
    trainer.state = RunState.of(config, record)
    trainer.state.positions = positions.without(trainer.state.positions.discarded)
    trainer.state.skipped_in_a_row = 0
    trainer.attempt += 1
    trainer.heart.attempt = trainer.attempt
    trainer.notify("on_rolled_back")
    place = f"the checkpoint of step {back}" if back else "its start"
    trainer.say(
        f"{reason}; back to {place}, without batch "
        f"{', '.join(map(str, batches)) or 'none'} ({before + 1} of at most {config.max_rollbacks})"
    )


def _had_checkpoints(trainer: Trainer) -> bool:
    """Whether the run has completed a checkpoint since it started; a collective."""
    completed = trainer.folder.completed_checkpoints() if trainer.world.is_main else []
    return bool(same_everywhere(completed))

"""`isoflop verify`: proves from its ledger which samples a run saw, without a GPU or a model."""

from __future__ import annotations

import dataclasses
import json
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.options import UserError, option

if TYPE_CHECKING:
    from pipeline.config import RunConfig
    from pipeline.data.loader import TrainingOrder
    from pipeline.data.run_order import InstructionOrder
    from tools.ledger import Ledger

_SAMPLES_A_TASK = 4096  # of the order, worked out by one worker at a time
_LEDGER = "ledger.jsonl"


@dataclass(frozen=True)
class Options:
    """Prove from its ledger that a run saw exactly the samples it should have.

    Works out the run's order anew from config.json and the shards' manifests, reads the samples of
    every step and compares their hash with the ledger's, across restarts, rollbacks and changes of
    the number of ranks; the last attempt at a step wins. What a policy skipped or discarded is told
    apart. One line for each finding, naming the step. The exit code is 0 when nothing was found, 1
    when something was, 2 for a mistake in the command.
    """

    run: str = option("a run folder", positional=True, metavar="DIR")
    fraction: float = option(
        "share of the steps whose hashes are worked out anew; gaps and repeats are always looked "
        "for in all",
        1.0,
        minimum=0,
    )
    seed: int = option("chooses the steps of that share", 0, minimum=0)
    data: str | None = option("the shard folder, where it was moved", None, metavar="DIR")
    flan: str | None = option("the FLAN folder, where it was moved", None, metavar="DIR")
    workers: int = option("processes (0: one for each core)", 0, minimum=0)
    json: bool = option("print the summary as JSON", False)

    def problems(self) -> Iterator[str]:
        """What single fields cannot say."""
        if not self.fraction <= 1:
            yield f"fraction={self.fraction}: more than all; give 0 to 1"


def run(options: Options) -> None:
    """Verify the run; exits with 1 where something was found."""
    from pipeline.run_folder import RunFolder
    from tools.ledger import read_ledger

    folder = RunFolder(options.run)
    config = run_config(folder.read_config(), options)
    order = open_order(config)
    path = folder.path / _LEDGER
    try:
        ledger = read_ledger(path, config.global_batch)
    except OSError as error:
        raise UserError(
            f"run={options.run!r}: its {_LEDGER} cannot be read ({error.strerror}); give a run "
            "that has made a step"
        ) from None
    steps = chosen_steps(sorted(ledger.steps), options)
    count = 0
    for finding in findings(folder, config, ledger, steps, options.workers):
        print(f"{_LEDGER}: {finding}", flush=True)
        count += 1
    if count:
        print(f"{folder.path}: {count} finding{'s' if count > 1 else ''}", file=sys.stderr)
        sys.exit(1)
    told = summary(config, ledger, len(steps), order)
    print(json.dumps(told) if options.json else sentence(folder.path, told))


def run_config(document: dict[str, Any], options: Options) -> RunConfig:
    """The run's configuration, its data found where they are now.

    Raises UserError where they are not what the run was trained on.
    """
    from pipeline.config import RunConfig
    from pipeline.data.manifest import check_folder
    from pipeline.data.run_order import order_version, refuse_other_order
    from pipeline.options import load

    config = load(RunConfig, document["run"], source="config.json")
    for key in ("data", "flan"):
        moved = getattr(options, key)
        if getattr(config, key) is None:
            if moved is not None:
                raise UserError(f"{key}={moved!r}: the run has none; leave it out")
            continue
        config = dataclasses.replace(config, **{key: moved or getattr(config, key)})
        recorded = document.get(key, {}).get("fingerprint")
        manifest = check_folder(getattr(config, f"{key}_folder"))
        if manifest.fingerprint != recorded:
            raise UserError(
                f"{key}={getattr(config, key)!r}: not what the run was trained on (its fingerprint "
                f"differs); give that with --{key} DIR"
            )
        if key == "data":
            made = order_version(config, manifest)
            refuse_other_order(document["data"].get("order"), made, f"the run in {options.run}")
    return config


@lru_cache(maxsize=1)
def _cached_order(data: str, flan: str | None, text: str) -> TrainingOrder | InstructionOrder:
    from pipeline.config import RunConfig
    from pipeline.data.flan import FlanStore
    from pipeline.data.run_order import InstructionOrder, pretraining_order
    from pipeline.options import load

    config = load(RunConfig, json.loads(text), source="config.json")
    if flan is not None:
        return InstructionOrder(FlanStore(str(config.flan_folder), "train"), config.seed)
    return pretraining_order(config)


def open_order(config: RunConfig) -> TrainingOrder | InstructionOrder:
    """What the run reads at each position, opened once a process."""
    return _cached_order(
        str(config.data_folder), config.flan, json.dumps(dataclasses.asdict(config))
    )


def chosen_steps(steps: Sequence[int], options: Options) -> list[int]:
    """The steps whose hashes are worked out anew: a random share, the first and last always."""
    if options.fraction >= 1 or not steps:
        return list(steps)
    count = round(len(steps) * options.fraction)
    drawn = random.Random(options.seed).sample(steps, count)
    return sorted({*drawn, steps[0], steps[-1]})


def findings(
    folder: Any, config: RunConfig, ledger: Ledger, steps: list[int], workers: int
) -> Iterator[str]:
    """Everything that is wrong, as lines that name a step."""
    from tools.check_progress import CheckProgress
    from tools.worker_pool import in_order

    yield from ledger.findings
    last = ledger.last_step
    if last > config.steps:
        yield f"step {last}: the run has {config.steps} steps"
    if folder.is_finished and last < (end := folder.finished_step(config.steps)):
        yield f"step {last}: is the last, but the run is FINISHED after {end}"
    saved = [int(path.name[5:]) for path in folder.checkpoints.glob("step_*[0-9]")]
    if saved and max(saved) > last:
        yield f"step {last}: is the last, but there is a checkpoint of step {max(saved)}"
    each = max(1, _SAMPLES_A_TASK // config.global_batch)
    claims = [
        (step, ledger.positions.span(step - 1)[0], ledger.steps[step].hash) for step in steps
    ] + [(entry.step, entry.start, entry.hash) for entry in ledger.discarded]
    tasks = [(config, claims[begin : begin + each]) for begin in range(0, len(claims), each)]
    progress = CheckProgress("verify", len(claims), unit="steps")
    count = 0
    try:
        for number, found in enumerate(in_order(check_steps, tasks, workers), 1):
            count += len(found)
            progress.show(min(number * each, len(claims)), count)
            yield from found
    finally:
        progress.close()


def check_steps(task: tuple[RunConfig, list[tuple[int, int, int]]]) -> list[str]:
    """Findings of some steps, given with their first positions and the hashes in the ledger."""
    from pipeline.data.run_order import batch_hash
    from pipeline.data.shards import CorruptShardError

    config, steps = task
    order = open_order(config)
    found = []
    for step, start, recorded in steps:
        try:
            expected = batch_hash(order, start, config.global_batch)
        except CorruptShardError as error:
            found.append(f"step {step}: its samples cannot be read: {error}")
            continue
        if expected != recorded:
            found.append(
                f"step {step}: the hash {recorded:016x} is not that of the samples at positions "
                f"{start} to {start + config.global_batch}, {expected:016x}"
            )
    return found


def summary(
    config: RunConfig, ledger: Ledger, checked: int, order: TrainingOrder | InstructionOrder
) -> dict[str, Any]:
    """What was proved, as numbers."""
    from pipeline.data.run_order import InstructionOrder

    events = ledger.events()
    position = ledger.batches * config.global_batch
    if isinstance(order, InstructionOrder):
        epochs = {"flan": position / len(order.store)}
    else:
        epochs = order.epochs(position)
    return {
        "steps": ledger.last_step,
        "of": config.steps,
        "samples": position,
        "attempts": len(ledger.attempts),
        **{event: events[event] for event in ("applied", "skipped", "discarded")},
        "made_again": len(ledger.replaced),
        "hashes_checked": checked,
        "epochs": {name: round(value, 6) for name, value in epochs.items()},
        "torn_last_line": ledger.torn,
    }


def sentence(folder: Path, told: dict[str, Any]) -> str:
    """The summary for people."""
    epochs = ", ".join(f"{name} {value:.3f}" for name, value in told["epochs"].items())
    torn = "; the last line is torn, as a kill leaves it" if told["torn_last_line"] else ""
    return (
        f"{folder}: steps 1 to {told['steps']:,} of {told['of']:,} saw samples 0 to "
        f"{told['samples']:,} of their order, each once: {told['applied']:,} applied, "
        f"{told['skipped']:,} skipped, and {told['discarded']:,} discarded batches between; "
        f"{told['attempts']:,} "
        f"attempt{'s' if told['attempts'] != 1 else ''}, {told['made_again']:,} steps made again; "
        f"hashes worked out anew for {told['hashes_checked']:,} steps; epochs: {epochs}{torn}"
    )

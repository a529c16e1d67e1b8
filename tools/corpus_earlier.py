"""What earlier commands on the same folder left, proved before it is gone on from."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pipeline.atomic import write_atomically
from pipeline.options import UserError
from tools.check_progress import CheckProgress
from tools.corpus import InputFile
from tools.corpus_plan import Task
from tools.corpus_records import Record, is_begun, read_done, record_path


def refuse_newer_inputs(
    output: Path, files: Sequence[InputFile], tasks: Sequence[Task]
) -> list[str]:
    """Refuse inputs that were written since the folder was begun; the first command notes when.

    What the plan keeps of an input (its size, and a checksum of both ends) does not see a change in
    the middle: tasks that are done would then hold what was there before. An input of which none is
    done may be written.

    Returns:
        The names of such inputs.

    Raises:
        UserError: naming the first other one.
    """
    path = output / "tasks" / "inputs.times"
    now = {file.name: file.modified for file in files}
    try:
        begun = json.loads(path.read_bytes())
    except FileNotFoundError:
        write_atomically(path, json.dumps(now))
        return []
    except ValueError:
        begun = None
    if not isinstance(begun, dict):
        raise UserError(
            f"output={str(output)!r}: its tasks/{path.name} is damaged; give another --output, or "
            "remove this one"
        )
    newer = {file.name for file in files if begun.get(file.name) != file.modified}
    held = {task.input for task in tasks if task.input in newer and is_begun(output, task.id)}
    for file in files:
        then = begun.get(file.name)
        if file.name in held:
            seconds = f"{then // 10**9}.{then % 10**9:09}" if isinstance(then, int) else "…"
            raise UserError(
                f"input={str(file.path)!r}: was written since {output} was begun, "
                f"{file.told_time()}; give another --output, or, if you know that its bytes are "
                f"the same, touch --date=@{seconds} it"
            )
    if newer:
        write_atomically(path, json.dumps(now))
    return sorted(newer)


def forget_damaged(output: Path, tasks: Sequence[Task]) -> None:
    """Forget tasks of which a shard is not, byte for byte, what their record says: they run again.

    A record says that its shards were on disk; it cannot say what became of them. All of them are
    read once, by a thread for each core. What this command writes itself is hashed on its way.
    """
    records = [
        record
        for task in tasks
        if (record := read_done(output, task.id)) is not None and record.shards
    ]
    if not records:
        return
    total = sum(shard.bytes for record in records for shard in record.shards)
    progress = CheckProgress("check what is done", total / 1e6)
    done = damaged = 0
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        wrong = pool.map(lambda record: _first_damaged(output, record), records)
        for record, found in zip(records, wrong, strict=True):
            done += sum(shard.bytes for shard in record.shards)
            if found is not None:
                damaged += 1
                record_path(output, record.id).unlink()
                told = f"tokenize: {found} is damaged: task {record.id} runs again"
                print(told, file=sys.stderr, flush=True)
            progress.show(done / 1e6, damaged)
    progress.close()


def _first_damaged(output: Path, record: Record) -> str | None:
    for shard in record.shards:
        with open(output / shard.path, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != shard.sha256:
                return shard.path
    return None

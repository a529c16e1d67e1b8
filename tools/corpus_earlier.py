"""What earlier commands on the same folder left, proved before it is gone on from."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tools.check_progress import CheckProgress
from tools.corpus_plan import Task
from tools.corpus_records import Record, read_done, record_path


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

"""Whether inputs still are what was read of them: by their times, and where these differ, bytes.

What a task read is told in its marks: a checksum of the bytes as they are stored, and, as the time
of the mark itself, the input's ctime. A file of the same size and ctime is taken for the same;
whatever else is read again.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import xxhash

from pipeline.options import UserError
from tools.check_progress import CheckProgress
from tools.corpus import InputFile
from tools.corpus_plan import Task
from tools.corpus_records import Record, reading_marks, record_path, stamp

# Nanoseconds that the times of file systems are whole multiples of: SMB's of 100, others' of
# microseconds, milliseconds, hundredths of a second, or seconds.
_TIME_UNITS = (1, 100, 10**3, 10**6, 10**7, 10**9)
_PIECE = 1 << 20


@dataclass(frozen=True)
class _Suspect:
    """A task whose input may have changed since it was read.

    Attributes:
        marks: each that tells what was read, and its checksum.
        changed: ctime of the input, taken before it is read again.
    """

    task: Task
    marks: Mapping[Path, str]
    changed: int


def refuse_changed(output: Path, files: Sequence[InputFile], tasks: Sequence[Task]) -> int:
    """Refuse inputs of which tasks that are done read something else than is there now.

    Returns:
        How many tasks have no record that tells what they read.

    Raises:
        UserError: naming the first such input.
    """
    changed = {file.name: _changed(file) for file in files}
    suspects = []
    untold = 0
    for task in tasks:
        marks = reading_marks(output, task.id)
        when = changed[task.input]
        moved = [mark for mark in marks if not _is_same_time(mark.stat().st_mtime_ns, when)]
        told = {mark: read for mark in moved if (read := _told(mark)) is not None}
        record = record_path(output, task.id)
        untold += record not in marks or (record in moved and record not in told)
        if told:
            suspects.append(_Suspect(task, told, when))
    if suspects:
        _read_again(output, suspects, {file.name: file for file in files})
    return untold


def _changed(file: InputFile) -> int:
    """The ctime of an input. Raises UserError where it is gone or has another size."""
    try:
        status = file.path.stat()
        if status.st_size == file.size:
            return status.st_ctime_ns
        now = f"{status.st_size:,} bytes"
    except OSError as error:
        now = error.strerror or str(error)
    raise UserError(
        f"input={str(file.path)!r}: changed while it was read (it had {file.size:,} bytes, now: "
        f"{now}); start again when it is left alone, with a new --output"
    )


def _is_same_time(noted: int, changed: int) -> bool:
    # Where the output lies, less of a time may be kept than where the inputs do.
    return any(noted == changed // unit * unit for unit in _TIME_UNITS)


def _told(mark: Path) -> str | None:
    """The checksum in a mark; None where it is damaged, so that its task runs again."""
    try:
        if mark.suffix == ".json":
            return Record.load(mark).read
        return str(json.loads(mark.read_bytes())["read"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _read_again(output: Path, suspects: Sequence[_Suspect], files: Mapping[str, InputFile]) -> None:
    names = sorted({suspect.task.input for suspect in suspects})
    more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
    print(
        f"tokenize: {names[0]}{more} may have changed since it was read: read again",
        file=sys.stderr,
        flush=True,
    )
    sizes = [(s.task.end or files[s.task.input].size) - s.task.begin for s in suspects]
    progress = CheckProgress("check inputs", sum(sizes) / 1e6)
    done = 0
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        found = pool.map(lambda suspect: _digest(suspect.task), suspects)
        try:
            for suspect, size, digest in zip(suspects, sizes, found, strict=True):
                if {digest} != set(suspect.marks.values()):
                    raise _other_bytes(output, suspect.task)
                _stamp_all(suspect.marks, suspect.changed)
                done += size
                progress.show(done / 1e6, 0)
        finally:
            pool.shutdown(cancel_futures=True)
            progress.close()


def _stamp_all(marks: Iterable[Path], changed: int) -> None:
    for mark in marks:
        stamp(mark, changed)


def _digest(task: Task) -> str:
    """Checksum of the bytes of a task's range as they are stored. Raises UserError."""
    digest = xxhash.xxh3_64()
    try:
        with open(task.path, "rb", buffering=0) as file:
            file.seek(task.begin)
            left = sys.maxsize if task.end is None else task.end - task.begin
            while left and (piece := file.read(min(left, _PIECE))):
                digest.update(piece)
                left -= len(piece)
    except OSError as error:
        raise UserError(
            f"input={task.path!r}: cannot be read ({error.strerror}); see to it, and the same "
            "command goes on"
        ) from None
    return digest.hexdigest()


def _other_bytes(output: Path, task: Task) -> UserError:
    where = "" if task.end is None else f" between byte {task.begin:,} and {task.end:,}"
    return UserError(
        f"input={task.path!r}: changed since it was read for {output}: it holds something else"
        f"{where}; bring back what it was, or start again with a new --output"
    )

"""What a shard folder is made from, fixed before work: tasks, settings, and who may write."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from pipeline.data.manifest import FILE_NAME
from pipeline.options import UserError
from tools.corpus import InputFile, is_splittable, source_of_path
from tools.corpus_records import reading_marks, unwritable

PLAN_FORMAT = 3
_REMEDY = "give another --output, or remove this one"


@dataclass(frozen=True)
class Task:
    """One range of one input.

    Attributes:
        id: from 0; shards are named after it.
        input: name of the input file, as in the manifest.
        path: where that file is.
        begin, end: bytes of a plain file; a compressed one is read whole (0, None).
        source: what the path tells, or None to ask each row.
    """

    id: int
    input: str
    path: str
    begin: int
    end: int | None
    source: str | None


@dataclass(frozen=True)
class Settings:
    """What the output depends on besides inputs and tokenizer.

    Attributes:
        block_tokens: ids in a sample.
        task_bytes: bytes of a plain file a task reads.
        shard_bytes: where a shard is full.
        validation_fraction: of the documents, by hash.
        text_field: of a row.
        default_source: where neither path nor row tells one.
        max_row_bytes: a longer line is not used.
        min_characters, max_characters: a shorter or longer text is not used.
        dedup: none, exact, or minhash (which is exact as well).
        decontaminate: fingerprint of the evaluation n-grams, or empty.
    """

    block_tokens: int
    task_bytes: int
    shard_bytes: int
    validation_fraction: float
    text_field: str
    default_source: str
    max_row_bytes: int
    min_characters: int
    max_characters: int | None
    dedup: str
    decontaminate: str


def plan_path(output: Path) -> Path:
    """Where the plan of a shard folder lies."""
    return output / "tasks" / "plan.json"


def plan_tasks(files: list[InputFile], settings: Settings) -> list[Task]:
    """The tasks of a corpus: byte ranges of plain files, whole compressed files, in name order.

    They depend on the inputs and `task_bytes` alone.
    """
    tasks: list[Task] = []
    for file in files:
        step = settings.task_bytes if file.splittable else max(1, file.size)
        for begin in range(0, max(1, file.size), step):
            end = min(begin + step, file.size) if file.splittable else None
            source = source_of_path(file.path)
            tasks.append(Task(len(tasks), file.name, str(file.path), begin, end, source))
    return tasks


def check_plan(output: Path, plan: dict[str, Any]) -> list[str]:
    """Refuse an output that was begun with another tokenizer, other inputs or settings.

    An input of which nothing is in the output yet, as one that was broken and fetched again, may be
    another if it makes as many tasks.

    Returns:
        The names of such inputs.

    Raises:
        UserError: naming what differs.
    """
    try:
        existing = json.loads(plan_path(output).read_bytes())
    except FileNotFoundError:
        if output.is_dir() and any(output.iterdir()) and not (output / "tasks").is_dir():
            raise UserError(
                f"output={str(output)!r}: holds something else already; give an empty or new folder"
            ) from None
        return []
    except ValueError as error:
        raise UserError(
            f"output={str(output)!r}: its tasks/plan.json is damaged ({error}); {_REMEDY}"
        ) from None
    try:
        return _check_same(output, existing, plan)
    except (KeyError, TypeError, AttributeError):
        raise UserError(
            f"output={str(output)!r}: its tasks/plan.json is damaged; {_REMEDY}"
        ) from None


def _check_same(output: Path, existing: dict[str, Any], plan: dict[str, Any]) -> list[str]:
    if existing["format"] != plan["format"]:
        raise UserError(f"output={str(output)!r}: was begun by another version; {_REMEDY}")
    if existing.keys() != plan.keys() or existing["settings"].keys() != plan["settings"].keys():
        raise KeyError("other keys")
    if existing["tokenizer_sha256"] != plan["tokenizer_sha256"]:
        raise UserError(
            f"tokenizer: {output} was begun with another tokenizer "
            f"({existing['tokenizer_sha256'][:12]}… there, {plan['tokenizer_sha256'][:12]}… now); "
            f"{_REMEDY}"
        )
    for name, value in plan["settings"].items():
        if (before := existing["settings"][name]) != value:
            raise UserError(
                f"{name}={value!r}: {output} was begun with {before!r}; give that, or {_REMEDY}"
            )
    then = {item["name"]: item for item in existing["inputs"]}
    now = {item["name"]: item for item in plan["inputs"]}
    changed = sorted(name for name in then.keys() | now.keys() if then.get(name) != now.get(name))
    if changed and not _may_change(output, then, now, plan["settings"]["task_bytes"]):
        raise UserError(
            f"input: {output} was begun with other inputs ({len(changed)} differ, first "
            f"{changed[0]}); {_REMEDY}"
        )
    return changed


def _may_change(output: Path, then: dict[str, Any], now: dict[str, Any], task_bytes: int) -> bool:
    """Whether inputs that differ keep the numbers of all tasks, and nothing was made of them."""
    if then.keys() != now.keys() or (output / FILE_NAME).exists():
        return False
    first = 0
    for name, item in sorted(now.items()):
        count = _num_tasks(name, item["size"], task_bytes)
        if item != then[name]:
            if count != _num_tasks(name, then[name]["size"], task_bytes):
                return False
            if any(reading_marks(output, task) for task in range(first, first + count)):
                return False
        first += count
    return True


def _num_tasks(name: str, size: int, task_bytes: int) -> int:
    """See `plan_tasks`."""
    return max(1, -(-size // task_bytes)) if is_splittable(PurePath(name)) else 1


@contextmanager
def only_one(output: Path) -> Iterator[None]:
    """Hold the folder's lock. Raises UserError when another command writes there."""
    with open(output / "tasks" / "lock", "wb") as file:
        try:
            # A POSIX lock is this process's own: no child that outlives it can keep it.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise UserError(
                f"output={str(output)!r}: another isoflop tokenize is writing there; wait for it"
            ) from None
        yield


@contextmanager
def told_if_unwritable(output: Path) -> Iterator[None]:
    """A full disk, or one that cannot be written, as one line.

    Raises:
        UserError: naming the folder, the reason and the remedy.
    """
    try:
        yield
    except OSError as error:
        raise unwritable(output, error) from None

"""What tasks leave in `OUTPUT/tasks/`: records, tails, rejected rows, and what runs right now.

A task is done when its record is there and every file that the record names is as it says. A record
carries a checksum of itself: one that was damaged counts as absent, and the task runs again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import socket
from dataclasses import dataclass
from pathlib import Path

import xxhash

from pipeline.atomic import write_atomically
from pipeline.data.manifest import Shard
from pipeline.options import UserError

RECORD_FORMAT = 3


@dataclass(frozen=True)
class Record:
    """What a finished task says of itself; `tasks/{id}.json`.

    Attributes:
        id, input: of the task.
        rows: lines that are not blank.
        documents: rows that became tokens.
        tokens: ids of them, [EOD] included.
        rejects: rows that became none, by reason.
        replaced_surrogates: lone ones that became U+FFFD.
        shards: of whole blocks.
        tails: (split, source, ids) of what filled no block: the finaliser puts them, in task order,
            into the shards of task number `number of tasks`, where a document cut by the last block
            goes on.
        files: name in `tasks/` to checksum (XXH3) of what else the task left there.
        read: checksum (XXH3) of the bytes of its input that the task read, as they are stored.
    """

    id: int
    input: str
    rows: int
    documents: int
    tokens: int
    rejects: dict[str, int]
    replaced_surrogates: int
    shards: tuple[Shard, ...]
    tails: tuple[tuple[str, str, int], ...]
    files: dict[str, str]
    read: str

    def write(self, path: Path) -> None:
        """Put the record into place, atomically: the task is done."""
        body = json.dumps(dataclasses.asdict(self), sort_keys=True)
        digest = xxhash.xxh3_64_hexdigest(body.encode())
        write_atomically(
            path, f'{{"format": {RECORD_FORMAT}, "xxh3": "{digest}", "record": {body}}}\n'
        )

    @staticmethod
    def load(path: Path) -> Record:
        """The record in file `path`. Raises ValueError when it is damaged, OSError when absent."""
        told = json.loads(path.read_bytes())
        try:
            fields = told["record"]
            body = json.dumps(fields, sort_keys=True)
            if (told["format"], told["xxh3"]) != (
                RECORD_FORMAT,
                xxhash.xxh3_64_hexdigest(body.encode()),
            ):
                raise ValueError(f"{path}: does not match its checksum")
            shards = tuple(Shard(**shard) for shard in fields["shards"])
            tails = tuple((split, source, count) for split, source, count in fields["tails"])
            return Record(**{**fields, "shards": shards, "tails": tails})
        except (TypeError, KeyError) as error:
            raise ValueError(f"{path}: no record ({error})") from None


def record_path(output: Path, task: int) -> Path:
    """Where the record of a task lies."""
    return output / "tasks" / f"{task:06d}.json"


def tails_path(output: Path, task: int) -> Path:
    """Where the tails of a task lie until they are joined."""
    return output / "tasks" / f"{task:06d}.tails.npz"


def rejects_path(output: Path, task: int) -> Path:
    """Where the rejected rows of a task lie until they are joined."""
    return output / "tasks" / f"{task:06d}.rejects.jsonl"


def running_folder(output: Path) -> Path:
    """What tells of tasks that run or have just ended; whoever looks there sees no others."""
    return output / "tasks" / "running"


def running_path(output: Path, task: int) -> Path:
    """What a task tells of itself while it runs."""
    return running_folder(output) / f"{task:06d}.running"


def ended_path(output: Path, task: int) -> Path:
    """What becomes of `running_path` when the task has ended, well or not."""
    return running_folder(output) / f"{task:06d}.ended"


def failed_path(output: Path, task: int) -> Path:
    """Why a task failed."""
    return output / "tasks" / f"{task:06d}.failed"


def reading_marks(output: Path, task: int) -> list[Path]:
    """What the passes that read a task's input leave when they are done; `read` in each of them."""
    names = (f"{task:06d}{suffix}" for suffix in (".json", ".hashed", ".signed"))
    return [path for name in names if (path := output / "tasks" / name).exists()]


def stamp(mark: Path, changed: int) -> None:
    """Give a mark the time (ns) at which the input that it tells of was last changed: its ctime.

    What depends on the place of the input stays out of every file's content that way. A mark that
    loses its time costs another look at the bytes.
    """
    with contextlib.suppress(OSError):  # a finished folder may be read-only
        os.utime(mark, ns=(changed, changed))


def unwritable(output: Path, error: OSError) -> UserError:
    """What to tell when the output cannot be written."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    remedy = "make room there" if full else "see to it"
    return UserError(
        f"output={str(output)!r}: cannot be written ({error.strerror or error}); {remedy}, and the "
        "same command goes on"
    )


def file_digest(path: Path) -> str:
    """Checksum (XXH3, hexadecimal) of a whole file."""
    digest = xxhash.xxh3_64()
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def read_left(output: Path, record: Record, path: Path) -> bytes:
    """What a task left in a file beside its record, proved. Raises UserError when it is damaged."""
    content = path.read_bytes()
    if xxhash.xxh3_64_hexdigest(content) != record.files[path.name]:
        raise UserError(
            f"output={str(output)!r}: its tasks/{path.name} is damaged; give the same command again"
        )
    return content


def read_done(output: Path, task: int) -> Record | None:
    """The record of a task that is done, all its files being there; None if it has to run."""
    try:
        record = Record.load(record_path(output, task))
        for name, digest in record.files.items():
            if file_digest(output / "tasks" / name) != digest:
                return None
        for shard in record.shards:
            if (output / shard.path).stat().st_size != shard.bytes:
                return None
    except (OSError, ValueError):
        return None
    return record


@dataclass(frozen=True)
class Running:
    """What a running task tells about once a second.

    Attributes:
        host, process: where it runs.
        stored_bytes: of its input, that it has read.
        tokens, rejects: so far.
    """

    host: str
    process: int
    stored_bytes: int = 0
    tokens: int = 0
    rejects: int = 0

    @staticmethod
    def here(stored_bytes: int = 0, tokens: int = 0, rejects: int = 0) -> Running:
        """Of this process."""
        return Running(socket.gethostname(), os.getpid(), stored_bytes, tokens, rejects)

    def tell(self, path: Path) -> None:
        """Write it; a reader sees all of it or what was there before."""
        partial = path.with_name(f".{path.name}.{self.host}.{self.process}.partial")
        path.parent.mkdir(exist_ok=True)
        partial.write_text(json.dumps(dataclasses.asdict(self)))
        os.replace(partial, path)

    @staticmethod
    def read(path: Path) -> Running | None:
        """What is told there; None when nothing is."""
        with contextlib.suppress(OSError, ValueError, TypeError):
            return Running(**json.loads(path.read_bytes()))
        return None

    def is_gone(self) -> bool:
        """Whether its process ran on this machine and is no more."""
        if self.host != socket.gethostname():
            return False
        try:
            os.kill(self.process, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            return False
        return False

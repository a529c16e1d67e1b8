"""Tasks as a step of datatrove's pipelines, the same under every executor.

Executors report in ways of their own, so a task that fails leaves `tasks/{id}.failed` with its
reason, and what is done is told by our own records alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import xxhash
from datatrove.pipeline.base import PipelineStep
from loguru import logger

from pipeline.atomic import write_atomically
from pipeline.options import UserError
from tools.corpus_plan import Settings, Task
from tools.corpus_records import (
    Running,
    ended_path,
    failed_path,
    running_folder,
    running_path,
    unwritable,
)

GRACE_SECONDS = 40.0  # in which a shared file system shows what a node wrote (NFS: 30)
_LOOK_SECONDS = 1.0

Work = Callable[..., object]
Mark = Callable[[Path, int], Path]


class Detached(Exception):
    """Tasks go on elsewhere, and the command was told not to wait; says what to do."""


class TaskStep(PipelineStep):
    """A datatrove step that does `work(task, settings, output, in_worker=…)` for its rank.

    Executors send their step anew, or copy it, for each of what may be sixty thousand tasks: what
    goes along is the path of a list that they read from, once a process.

    Attributes:
        tasks: those to run; rank r runs the r-th of them. Known to the command alone.
        output: the shard folder.
        mark: the file that says that a task is done.
    """

    name = "isoflop tokenize"
    type = "tokenizer"

    def __init__(
        self, work: Work, mark: Mark, tasks: Sequence[Task], settings: Settings, output: Path
    ) -> None:
        super().__init__()
        self.mark = mark
        self.work, self.tasks, self.settings, self.output = work, list(tasks), settings, output
        self.command = Running.here()
        self.listed: Path | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "tasks": None}

    def prepare(self) -> None:
        """Put the list where workers read it, in the place of what earlier runs left.

        Nothing may be running.
        """
        forget_earlier_runs(self.output)
        rows = [json.dumps(dataclasses.astuple(task)) for task in self.tasks]
        content = "\n".join(rows).encode()
        # Named by its content: a worker that outlives a pass (Ray's do) never takes it for another.
        name = f"{xxhash.xxh3_64_hexdigest(content)}.tasks"
        self.listed = self.output / "tasks" / name
        write_atomically(self.listed, content)

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        """Run task number `rank` of those given to `prepare`; yields nothing.

        Raises:
            OSError: the output cannot be written, not even the reason.
        """
        assert self.listed is not None
        task = Task(*json.loads(_rows(self.listed)[rank]))
        if self.mark(self.output, task.id).exists():
            return  # a job that was killed and queued again begins with its first task
        here = Running.here()
        in_worker = here != self.command
        if in_worker:
            logger.disable("datatrove")
        running = running_path(self.output, task.id)
        try:
            here.tell(running)
            self.work(task, self.settings, self.output, in_worker=in_worker)
        except UserError as error:
            failed_path(self.output, task.id).write_text(f"{error}\n")
        except OSError as error:
            # Where not even the reason can be written, the executor may tell it.
            failed_path(self.output, task.id).write_text(f"{unwritable(self.output, error)}\n")
        except Exception:
            failed_path(self.output, task.id).write_text(traceback.format_exc())
        finally:
            # Who watches looks at what has ended since, not at all that is done.
            with contextlib.suppress(FileNotFoundError):
                os.replace(running, ended_path(self.output, task.id))
        yield from ()

    def is_told(self) -> bool:
        """Whether every task is done or has said why not."""
        return all(
            self.mark(self.output, task.id).exists() or failed_path(self.output, task.id).exists()
            for task in self.tasks
        )

    def wait_until_told(self) -> None:
        """When all have ended on other nodes: until this one sees it, but not for ever."""
        deadline = time.monotonic() + GRACE_SECONDS
        while not self.is_told() and time.monotonic() < deadline:
            time.sleep(_LOOK_SECONDS)


@lru_cache(maxsize=1)
def _rows(listed: Path) -> list[bytes]:
    return listed.read_bytes().split(b"\n")


def failure(output: Path, tasks: Sequence[Task]) -> UserError:
    """An error of one line on tasks that did not come to their end: what the first one told."""
    first = tasks[0]
    failed = failed_path(output, first.id)
    text = failed.read_text().strip() if failed.is_file() else "it left neither record nor reason"
    lines = text.splitlines()
    told = lines[-1] if len(lines) > 1 else text
    more = f" ({len(tasks) - 1} more failed)" if len(tasks) > 1 else ""
    where = f"; {failed} has the trace" if len(lines) > 1 else ""
    return UserError(f"task {first.id} of {first.input} failed{more}: {told}{where}")


def forget_earlier_runs(output: Path) -> None:
    """Remove what earlier runs told of tasks that failed or were running, and half-written files.

    Nothing may be running.
    """
    shutil.rmtree(running_folder(output), ignore_errors=True)
    for pattern in ("tasks/*.failed", "tasks/*.tasks", "tasks/.*.partial", "*/*/.*.partial"):
        for stale in output.glob(pattern):
            stale.unlink(missing_ok=True)

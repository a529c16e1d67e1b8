"""One pass over a corpus: the tasks that are not done yet, run anywhere, and watched."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tools.corpus_plan import Settings, Task
from tools.corpus_progress import Progress
from tools.corpus_records import (
    Running,
    failed_path,
    read_done,
    record_path,
    running_folder,
)
from tools.corpus_step import TaskStep, Work, failure
from tools.corpus_tasks import run_task

Runner = Callable[[TaskStep, Callable[[], None]], None]
Counts = tuple[int, int]  # tokens, rejected rows


@dataclass(frozen=True)
class Stage:
    """What a pass does.

    Attributes:
        label: for the progress line.
        work: does one task.
        mark: the file whose presence says that a task is done.
        done: (output, task id) to its counts, or None if it has to run.
    """

    label: str
    work: Work
    mark: Callable[[Path, int], Path]
    done: Callable[[Path, int], Counts | None]


def _tokenised(output: Path, task: int) -> Counts | None:
    record = read_done(output, task)
    return None if record is None else (record.tokens, sum(record.rejects.values()))


TOKENISE = Stage("tokenize", run_task, record_path, _tokenised)


def run_stage(
    stage: Stage,
    tasks: Sequence[Task],
    sizes: dict[int, int],
    settings: Settings,
    output: Path,
    runner: Runner,
) -> None:
    """Run the tasks that are not done.

    Args:
        sizes: task id to bytes of its input, as stored.

    Raises:
        UserError: naming a task that failed, and why; what is done stays.
        OSError: the output cannot be written.
    """
    counts = {task.id: stage.done(output, task.id) for task in tasks}
    missing = [task for task in tasks if counts[task.id] is None]
    if not missing:
        return
    for task in missing:
        stage.mark(output, task.id).unlink(missing_ok=True)
    watch = _Watcher(stage, missing, sizes, output, counts)
    try:
        runner(TaskStep(stage.work, stage.mark, missing, settings, output), watch)
    finally:
        watch.progress.close()
    failed = [task for task in missing if stage.done(output, task.id) is None]
    if failed:
        raise failure(output, failed)


class _Watcher:
    """Adds up what done and running tasks tell; call it now and then."""

    def __init__(
        self,
        stage: Stage,
        missing: Sequence[Task],
        sizes: dict[int, int],
        output: Path,
        counts: dict[int, Counts | None],
    ) -> None:
        self.stage, self.sizes, self.output = stage, sizes, output
        self.waiting = {task.id for task in missing}
        known = [found for found in counts.values() if found is not None]
        self.tokens = sum(tokens for tokens, _ in known)
        self.rejects = sum(rejects for _, rejects in known)
        self.done = sum(sizes[task] for task, found in counts.items() if found is not None)
        self.progress = Progress(stage.label, sum(sizes.values()), self.done)

    def __call__(self) -> None:
        done, tokens, rejects = 0, 0, 0
        for path in running_folder(self.output).glob("[0-9]*"):
            task = int(path.stem)
            if path.suffix == ".ended":
                self._end(task, path)
            elif task in self.waiting and (told := Running.read(path)) is not None:
                done += min(told.stored_bytes, self.sizes[task])
                tokens += told.tokens
                rejects += told.rejects
        done, tokens, rejects = done + self.done, tokens + self.tokens, rejects + self.rejects
        self.progress.show(done, tokens, rejects, len(self.waiting))

    def _end(self, task: int, ended: Path) -> None:
        found = self.stage.done(self.output, task) if task in self.waiting else None
        if found is not None:
            self.waiting.remove(task)
            self.done += self.sizes[task]
            self.tokens += found[0]
            self.rejects += found[1]
        elif task in self.waiting and not failed_path(self.output, task).exists():
            return  # what a node wrote last may be seen first
        ended.unlink(missing_ok=True)

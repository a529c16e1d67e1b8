"""`isoflop tokenize`: a corpus to sharded tokens with a manifest."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipeline.options import UserError, option

if TYPE_CHECKING:
    from pipeline.data.tokenizer import Tokenizer
    from tools.corpus import InputFile
    from tools.corpus_tasks import Settings, Task

PLAN_FORMAT = 1


@dataclass(frozen=True)
class Options:
    """Tokenise a corpus to WebDataset shards with a manifest.

    Reads RedPajama V1 and SlimPajama as they lie on disk, and any JSONL with a text field. Plain
    files are split inside, compressed ones are a task each. The output is the same, byte for byte,
    for any number of workers and after any kill; the same command goes on where it stopped, and
    leaves a finished output alone. Rows that are not used are counted in the manifest and listed in
    rejects.jsonl.
    """

    input: tuple[str, ...] = option(
        "globs of .jsonl, .jsonl.zst, .jsonl.gz, or a folder", metavar="GLOB,…"
    )
    output: str = option("the shard folder to write", metavar="DIR")
    tokenizer: str = option("a SentencePiece model", metavar="FILE")
    workers: int = option("processes; 1 runs in the command's own", 1, minimum=1)
    engine: Literal["local"] = option("where tasks run", "local")
    validation_fraction: float = option("share of documents held out, by hash", 0.01, minimum=0)
    block_tokens: int = option("ids in a sample; sequence lengths must divide it", 131_072)
    task_bytes: int = option("bytes of a plain file that a task reads", 256 << 20, minimum=1)
    shard_bytes: int = option("size at which a shard is full", 1 << 30, minimum=1)
    text_field: str = option("field of a row that holds its text", "text")
    default_source: str = option("source where neither path nor row tells one", "corpus")

    def problems(self) -> Iterator[str]:
        """What single fields cannot say."""
        if not 0 <= self.validation_fraction < 1:
            yield (
                f"validation_fraction={self.validation_fraction}: not a share below 1; "
                "give one such as 0.01"
            )
        if self.block_tokens < 8 or self.block_tokens % 8:
            yield f"block_tokens={self.block_tokens}: give a multiple of 8, such as 131072"
        if not self.default_source.replace("_", "").replace("-", "").isalnum():
            yield (
                f"default_source={self.default_source!r}: becomes a folder's name; give letters, "
                "digits, - and _ only"
            )
        if Path(self.output).exists() and not Path(self.output).is_dir():
            yield f"output={self.output!r}: is a file; give a folder"


def run(options: Options) -> None:
    """Plan, run the tasks that have no record yet, finalise."""
    from pipeline.atomic import write_atomically
    from pipeline.data.manifest import FILE_NAME, read_manifest
    from pipeline.data.tokenizer import load
    from tools.corpus import find_inputs
    from tools.corpus_finaliser import describe, remove_intermediate
    from tools.corpus_tasks import TOKENIZER_FILE, Settings

    tokenizer = load(options.tokenizer)
    files = find_inputs(options.input, exclude=Path(options.output))
    settings = Settings(**{f.name: getattr(options, f.name) for f in dataclasses.fields(Settings)})
    plan = {
        "format": PLAN_FORMAT,
        "tokenizer_sha256": tokenizer.sha256,
        "settings": dataclasses.asdict(settings),
        "inputs": [{"name": f.name, "size": f.size, "probe": f.probe()} for f in files],
    }
    output = Path(options.output)
    check_plan(output, plan)
    manifest = output / FILE_NAME
    if not manifest.is_file():
        (output / "tasks").mkdir(parents=True, exist_ok=True)
        with only_one(output):
            # Another command may have finished between the question and the lock.
            if not manifest.is_file():
                write_atomically(output / TOKENIZER_FILE, Path(options.tokenizer).read_bytes())
                write_atomically(plan_path(output), json.dumps(plan, indent=1) + "\n")
                tokenise(output, plan_tasks(files, settings), settings, tokenizer, plan, options)
                return
    remove_intermediate(output)
    print(f"tokenize: {output} is complete: {describe(read_manifest(output))}")


def plan_path(output: Path) -> Path:
    """Where the plan of a shard folder lies."""
    return output / "tasks" / "plan.json"


def plan_tasks(files: list[InputFile], settings: Settings) -> list[Task]:
    """The tasks of a corpus: byte ranges of plain files, whole compressed files, in name order.

    They depend on the inputs and `task_bytes` alone.
    """
    from tools.corpus import source_of_path
    from tools.corpus_tasks import Task

    tasks: list[Task] = []
    for file in files:
        step = settings.task_bytes if file.splittable else max(1, file.size)
        for begin in range(0, max(1, file.size), step):
            end = min(begin + step, file.size) if file.splittable else None
            source = source_of_path(file.path)
            tasks.append(Task(len(tasks), file.name, str(file.path), begin, end, source))
    return tasks


def check_plan(output: Path, plan: dict[str, Any]) -> None:
    """Refuse an output that was begun with another tokenizer, other inputs or settings.

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
        return
    remedy = "give another --output, or remove this one"
    if existing["tokenizer_sha256"] != plan["tokenizer_sha256"]:
        raise UserError(
            f"tokenizer: {output} was begun with another tokenizer "
            f"({existing['tokenizer_sha256'][:12]}… there, {plan['tokenizer_sha256'][:12]}… now); "
            f"{remedy}"
        )
    for name, value in plan["settings"].items():
        if existing["settings"].get(name) != value:
            raise UserError(
                f"{name}={value!r}: {output} was begun with {existing['settings'].get(name)!r}; "
                f"give that, or {remedy}"
            )
    before = {item["name"]: item for item in existing["inputs"]}
    now = {item["name"]: item for item in plan["inputs"]}
    changed = sorted(
        name for name in before.keys() | now.keys() if before.get(name) != now.get(name)
    )
    if changed:
        raise UserError(
            f"input: {output} was begun with other inputs ({len(changed)} differ, first "
            f"{changed[0]}); {remedy}"
        )
    if existing["format"] != plan["format"]:
        raise UserError(f"output={str(output)!r}: was begun by another version; {remedy}")


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


def tokenise(
    output: Path,
    tasks: list[Task],
    settings: Settings,
    tokenizer: Tokenizer,
    plan: dict[str, Any],
    options: Options,
) -> None:
    """Run the tasks without a record, then finalise."""
    from tools.corpus_engine import run_locally
    from tools.corpus_finaliser import describe, finalise
    from tools.corpus_progress import Progress
    from tools.corpus_tasks import record_path

    sizes = {item["name"]: item["size"] for item in plan["inputs"]}
    length = {t.id: sizes[t.input] if t.end is None else t.end - t.begin for t in tasks}
    missing = [task for task in tasks if not record_path(output, task.id).is_file()]
    waiting = {task.id for task in missing}
    skipped = sum(length.values()) - sum(length[i] for i in waiting)
    progress = Progress("tokenize", sum(length.values()), skipped)

    def watch() -> None:
        here = set(os.listdir(output / "tasks"))
        waiting.difference_update({i for i in waiting if record_path(output, i).name in here})
        done = sum(length.values()) - sum(length[i] for i in waiting)
        progress.show(done, f"{len(waiting)} of {len(tasks)} tasks left")

    started = time.monotonic()
    try:
        if missing:
            run_locally(missing, settings, output, options.workers, watch)
    finally:
        progress.close()
    manifest = finalise(output, tasks, settings, tokenizer, plan["inputs"])
    seconds = time.monotonic() - started
    print(f"tokenize: {output}: {describe(manifest)} ({seconds:.1f} s)")

"""`isoflop tokenize`: a corpus to sharded tokens with a manifest."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipeline.options import option

if TYPE_CHECKING:
    from pipeline.data.tokenizer import Tokenizer
    from tools.corpus import InputFile
    from tools.corpus_decontaminate import Evaluations
    from tools.corpus_plan import Settings, Task
    from tools.corpus_stage import Runner


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
    engine: Literal["local", "slurm", "ray"] = option(
        "where tasks run: on this machine, as a Slurm job array, on a Ray cluster", "local"
    )
    slurm: dict[str, str] = option(
        "options of sbatch, such as partition=cpu,time=24:00:00",
        default_factory=dict,
        metavar="NAME=VALUE,…",
    )
    detach: bool = option("with Slurm: do not wait; the same command later goes on", False)
    ray_address: str = option("of the Ray cluster; auto: this machine's, local: start one", "auto")
    validation_fraction: float = option("share of documents held out, by hash", 0.01, minimum=0)
    block_tokens: int = option("ids in a sample; sequence lengths must divide it", 131_072)
    task_bytes: int = option("bytes of a plain file that a task reads", 256 << 20, minimum=1)
    shard_bytes: int = option("size at which a shard is full", 1 << 30, minimum=1)
    text_field: str = option("field of a row that holds its text", "text")
    default_source: str = option("source where neither path nor row tells one", "corpus")
    min_characters: int = option("texts with fewer are rejected", 0, minimum=0)
    max_characters: int | None = option("texts with more are rejected", None, minimum=1)
    dedup: Literal["none", "exact", "minhash"] = option(
        "leave out equal texts but the first; minhash: near-equal ones too (extra dedup)", "none"
    )
    decontaminate: tuple[str, ...] = option(
        "JSONL files of evaluations: texts that share 13 words in a row with one are left out",
        (),
        metavar="GLOB,…",
    )
    max_row_bytes: int = option(
        "lines with more are rejected unread; a worker may take some seven times that in memory",
        64 << 20,
        minimum=1,
    )
    max_reject_rate: float = option(
        "fail if a larger share of the rows is unusable (what is filtered out by choice apart)",
        0.1,
        minimum=0,
    )

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
        if self.detach and self.engine != "slurm":
            yield f"detach=true: engine {self.engine} has nothing that goes on; give --engine slurm"
        missing = [name for name in ("regex", "spacy") if find_spec(name) is None]
        if self.dedup == "minhash" and missing:
            yield f"dedup='minhash': needs {' and '.join(missing)}; pip install 'isoflop[dedup]'"
        if self.max_characters is not None and self.max_characters < self.min_characters:
            yield (
                f"max_characters={self.max_characters}: below min_characters="
                f"{self.min_characters}; give a larger one"
            )


def run(options: Options) -> None:
    """Plan, run the tasks that have no record yet, finalise."""
    from pipeline.atomic import make_folder
    from pipeline.data.manifest import FILE_NAME, check_folder
    from pipeline.data.tokenizer import load
    from tools.corpus import find_inputs, told_alike, told_once
    from tools.corpus_decontaminate import keep_evaluations
    from tools.corpus_finaliser import describe, remove_intermediate
    from tools.corpus_plan import (
        PLAN_FORMAT,
        Settings,
        check_plan,
        only_one,
        plan_tasks,
        told_if_unwritable,
    )
    from tools.corpus_step import Detached
    from tools.corpus_unchanged import refuse_changed

    tokenizer = load(options.tokenizer)
    files = find_inputs(options.input, exclude=Path(options.output))
    inputs = [{"name": f.name, "size": f.size, "probe": f.probe()} for f in files]
    for told in (told_once(files), told_alike(files, [str(item["probe"]) for item in inputs])):
        if told:
            print(f"tokenize: {told}", file=sys.stderr)
    evaluations = evaluations_of(options)
    chosen = {f.name: getattr(options, f.name) for f in dataclasses.fields(Settings)}
    chosen["decontaminate"] = evaluations.fingerprint if evaluations else ""
    settings = Settings(**chosen)
    plan = {
        "format": PLAN_FORMAT,
        "tokenizer_sha256": tokenizer.sha256,
        "settings": dataclasses.asdict(settings),
        "inputs": inputs,
    }
    output = Path(options.output)
    check_plan(output, plan)
    manifest = output / FILE_NAME
    with told_if_unwritable(output):
        if not manifest.is_file():
            make_folder(output / "tasks")
            with only_one(output):
                # Another command may have finished between the question and the lock.
                if not manifest.is_file():
                    if evaluations:
                        keep_evaluations(output, evaluations)
                    try:
                        tokenise(output, files, settings, tokenizer, plan, options)
                    except Detached as told:
                        print(f"tokenize: {told}")
                    return
        made = check_folder(output)
        if untold := refuse_changed(output, files, plan_tasks(files, settings)):
            print(
                f"tokenize: {untold} of its tasks' records are missing or damaged: no change in "
                "the middle of what they read would be noticed",
                file=sys.stderr,
            )
        remove_intermediate(output)
    print(f"tokenize: {output} is complete: {describe(made)}")


def tokenise(
    output: Path,
    files: list[InputFile],
    settings: Settings,
    tokenizer: Tokenizer,
    plan: dict[str, Any],
    options: Options,
) -> None:
    """Run the tasks that are not done, then finalise."""
    from pipeline.atomic import write_atomically
    from pipeline.data.encoder import encoder_of
    from tools.corpus_earlier import forget_damaged
    from tools.corpus_finaliser import describe, finalise
    from tools.corpus_plan import check_plan, plan_path, plan_tasks
    from tools.corpus_stage import TOKENISE, run_stage
    from tools.corpus_tasks import TOKENIZER_FILE
    from tools.corpus_unchanged import refuse_changed

    started = time.monotonic()
    settle(output, options)
    tasks = plan_tasks(files, settings)
    # Again, as what was at work until now may have done more.
    for name in check_plan(output, plan):
        print(f"tokenize: {name} changed before anything was made of it", file=sys.stderr)
    refuse_changed(output, files, tasks)
    write_atomically(output / TOKENIZER_FILE, tokenizer.model)
    write_atomically(plan_path(output), json.dumps(plan, indent=1) + "\n")
    engine = encoder_of(tokenizer).engine
    if engine.reason:
        print(f"tokenize: by {engine.name}, slower: {engine.reason}", file=sys.stderr)
    stored = {file.name: file.size for file in files}
    sizes = {t.id: stored[t.input] if t.end is None else t.end - t.begin for t in tasks}
    runner = runner_of(options)
    forget_damaged(output, tasks)
    if settings.dedup != "none":
        find_all_duplicates(tasks, sizes, settings, output, runner)
        refuse_changed(output, files, tasks)
    run_stage(TOKENISE, tasks, sizes, settings, output, runner)
    refuse_changed(output, files, tasks)
    manifest = finalise(output, tasks, settings, tokenizer, plan["inputs"], options.max_reject_rate)
    print(f"tokenize: {output}: {describe(manifest)} ({time.monotonic() - started:.1f} s)")


def settle(output: Path, options: Options) -> None:
    """Wait for what an earlier command on this folder left at work."""
    if options.engine == "slurm":
        from tools.corpus_slurm import settle_on_slurm

        settle_on_slurm(output, options.detach)
    elif options.engine == "local":
        from tools.corpus_engine import wait_for_orphans

        wait_for_orphans(output)
    else:
        from tools.corpus_ray import settle_on_ray

        settle_on_ray(output)


def evaluations_of(options: Options) -> Evaluations | None:
    """The n-grams that exclude a text, if any were asked for."""
    if not options.decontaminate:
        return None
    from tools.corpus import find_inputs
    from tools.corpus_decontaminate import read_evaluations

    found = read_evaluations(find_inputs(options.decontaminate, "decontaminate"))
    short = f" ({found.short} too short for one)" if found.short else ""
    print(
        f"tokenize: {len(found.hashes):,} n-grams of {found.texts:,} evaluation texts{short}",
        file=sys.stderr,
    )
    return found


def find_all_duplicates(
    tasks: list[Task], sizes: dict[int, int], settings: Settings, output: Path, runner: Runner
) -> None:
    """The passes before the tokens: exact duplicates, then near ones if asked for."""
    from tools import corpus_dedup, corpus_minhash
    from tools.corpus_stage import run_stage

    if not corpus_dedup.exact_path(output).is_file():
        run_stage(corpus_dedup.HASH, tasks, sizes, settings, output, runner)
        corpus_dedup.find_duplicates(output, tasks)
    if settings.dedup == "minhash" and not corpus_minhash.near_path(output).is_file():
        run_stage(corpus_minhash.SIGN, tasks, sizes, settings, output, runner)
        buckets = corpus_minhash.bucket_tasks()
        share = {task.id: 1 for task in buckets}
        run_stage(corpus_minhash.PAIR, buckets, share, settings, output, runner)
        corpus_minhash.find_near_duplicates(output, tasks)


def runner_of(options: Options) -> Runner:
    """What runs tasks where the options say."""
    workers = options.workers
    if options.engine == "slurm":
        from tools.corpus_slurm import run_on_slurm

        return lambda step, watch: run_on_slurm(step, workers, options.slurm, options.detach, watch)
    if options.engine == "ray":
        from tools.corpus_ray import run_on_ray

        return lambda step, watch: run_on_ray(step, workers, options.ray_address, watch)
    from tools.corpus_engine import run_locally

    return lambda step, watch: run_locally(step, workers, watch)

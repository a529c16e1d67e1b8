"""`python -m tests.benchmarks`: run pairs, print a table, keep the figures in a file."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.atomic import write_atomically
from pipeline.options import UserError, option, parse_command_line
from pipeline.program import run_as_program
from tests.benchmarks.catalogue import ABSENT_PEERS, ALL
from tests.benchmarks.measure import NotRun, UnequalWork, measure
from tests.benchmarks.report import FORMAT, as_record, machine, table

PROGRAM = "python -m tests.benchmarks"
# One thread on every side, in this process and those it starts.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "RAYON_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "DS_ACCELERATOR": "cpu",
}


@dataclass(frozen=True)
class Options:
    """Measure isoflop against what a user would otherwise pick.

    Each benchmark is a pair that does equal work, which is checked; pairs are interleaved, on one
    thread, after a warm-up, and costs are CPU-seconds. A ratio above 1 means ours is cheaper; its
    interval covers the median over pairs with at least 95 %. Exit code 1 if any of them failed.
    """

    output: str = option("the file that keeps the figures", "benchmarks.json", metavar="FILE")
    peers: bool = option("those that need more than the project's own environment", False)
    pairs: int = option("interleaved pairs of each; an interval needs 6", 9, minimum=1)
    only: tuple[str, ...] = option("names, separated by commas", (), metavar="NAME,…")
    list: bool = option("only say what there is", False)

    def problems(self) -> Iterator[str]:
        """What single fields cannot say."""
        for name in self.only:
            if name not in ALL:
                yield f"only={name!r}: no such benchmark; give one of: {', '.join(ALL)}"
        if Path(self.output).is_dir():
            yield f"output={self.output!r}: is a folder; give a file such as benchmarks.json"


def run(options: Options) -> int:
    """Run what was asked for; the exit code."""
    if options.list:
        print_list()
        return 0
    kept = read_kept(Path(options.output))
    names = options.only or tuple(n for n, b in ALL.items() if b.peer == options.peers)
    records: list[dict[str, Any]] = []
    for name in names:
        record = run_one(name, options.pairs)
        records.append(record)
        # After each, so that an interrupted run keeps what it has measured.
        kept[name] = record
        document = {"format": FORMAT, "results": list(kept.values())}
        write_atomically(Path(options.output), json.dumps(document, indent=1) + "\n")
    print(table(records))
    if options.peers:
        for name, needed in ABSENT_PEERS.items():
            print(f"{name}: not run: no comparison is written; it would take {needed}")
    return int(any("failed" in record for record in records))


def print_list() -> None:
    """A paragraph for each benchmark."""
    for name, benchmark in ALL.items():
        kind = " (--peers)" if benchmark.peer else ""
        print(f"{name}{kind}, {benchmark.process}")
        print(f"    ours: {benchmark.ours}\n    theirs: {benchmark.theirs}")
        if benchmark.note:
            print(f"    note: {benchmark.note}")


def read_kept(path: Path) -> dict[str, dict[str, Any]]:
    """The records of an earlier run by name; those measured anew replace their own.

    Raises:
        UserError: the file holds something else.
    """
    if not path.exists():
        return {}
    with contextlib.suppress(ValueError, KeyError, TypeError):
        document = json.loads(path.read_bytes())
        if document["format"] == FORMAT:
            return {record["name"]: record for record in document["results"]}
    raise UserError(f"output={str(path)!r}: holds no benchmarks of this version; give another file")


def run_one(name: str, pairs: int) -> dict[str, Any]:
    """Prepare, measure and close one benchmark; its record, whatever became of it."""
    benchmark = ALL[name]
    started = time.monotonic()
    record: dict[str, Any] = {
        "name": name,
        "ours": benchmark.ours,
        "theirs": benchmark.theirs,
        "process": benchmark.process,
        "note": benchmark.note,
        "measured": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }

    def tell(number: int) -> None:
        seconds = time.monotonic() - started
        print(f"{name}: pair {number + 1}/{pairs}, {seconds:.0f} s", file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory(prefix="isoflop-bench-") as folder:
        try:
            print(f"{name}: preparing", file=sys.stderr, flush=True)
            contest = benchmark.prepare(Path(folder))
            try:
                found = measure(contest, pairs, tell)
            finally:
                contest.close()
        except NotRun as reason:
            print(f"{name}: not run: {reason}", flush=True)
            return record | {"not_run": str(reason)}
        except UnequalWork as reason:
            print(f"{name}: failed: {reason}", flush=True)
            return record | {"failed": str(reason)}
        except Exception as error:
            # One broken peer must not cost the figures of all the others; the exit code tells.
            traceback.print_exc()
            return record | {"failed": f"{type(error).__name__}: {error}"}
    seconds = round(time.monotonic() - started, 1)
    return record | as_record(found, contest) | {"seconds": seconds, "machine": machine()}


def main() -> None:
    """The program's entry."""
    # Nothing that reads these has been imported yet: benchmarks import torch when they prepare.
    os.environ.update(ENVIRONMENT)
    sys.exit(run(parse_command_line(Options, sys.argv[1:], PROGRAM)))


if __name__ == "__main__":
    run_as_program(main)

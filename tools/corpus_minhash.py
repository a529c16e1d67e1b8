"""Near-duplicates by datatrove's own MinHash blocks: signatures, buckets, clusters.

What is an exact duplicate never enters, so that of each cluster one document stays.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.atomic import write_atomically
from tools.corpus_dedup import (
    NEAR_DUPLICATE,
    document_counts,
    exact_path,
    read_drops,
    write_drops,
)
from tools.corpus_plan import Settings, Task
from tools.corpus_records import file_digest, stamp
from tools.corpus_rows import Document
from tools.corpus_stage import Counts, Stage
from tools.corpus_streams import Reading
from tools.corpus_tasks import task_documents

NUM_BUCKETS, HASHES_PER_BUCKET = 14, 8  # datatrove's: 3 in 4 pairs of similarity 0.8 are found
LANGUAGE = "eng"


def near_path(output: Path) -> Path:
    """The drops that exact and near duplicates are."""
    return output / "tasks" / "near.drops"


def _folder(output: Path, name: str) -> Path:
    return output / "tasks" / "minhash" / name


def _config() -> Any:
    from datatrove.pipeline.dedup import minhash
    from datatrove.utils.hashing import HashConfig

    return minhash.MinhashConfig(
        num_buckets=NUM_BUCKETS,
        hashes_per_bucket=HASHES_PER_BUCKET,
        hash_config=HashConfig(precision=64, hash_fc="sha1"),
    )


def signature_task(
    task: Task, settings: Settings, output: Path, *, in_worker: bool = False
) -> None:
    """Leave the signatures of one task's documents."""
    from datatrove.data import Document as TroveDocument
    from datatrove.pipeline.dedup import minhash

    keep = read_drops(exact_path(output), task.id) == 0
    reading = Reading(task.begin, task.end)

    def documents() -> Iterator[Any]:
        rows = task_documents(task, settings, reading)
        texts = (row for row in rows if isinstance(row, Document))
        for number, row in enumerate(texts):
            if keep[number]:
                yield TroveDocument(text=row.text, id=str(number))

    step = minhash.MinhashDedupSignature(
        str(_folder(output, "signatures")), config=_config(), language=LANGUAGE
    )
    step.run(documents(), task.id, 1)
    mark = _signed(output, task.id)
    mark_done(mark, signature_files(output, task.id), read=reading.digest())
    stamp(mark, reading.changed)


def bucket_task(task: Task, settings: Settings, output: Path, *, in_worker: bool = False) -> None:
    """Find the pairs of one bucket."""
    from datatrove.pipeline.dedup import minhash

    step = minhash.MinhashDedupBuckets(
        str(_folder(output, "signatures")), str(_folder(output, "pairs")), config=_config()
    )
    step.run(None, task.id, NUM_BUCKETS)
    mark_done(_paired(output, task.id), pair_files(output, task.id))


def _signed(output: Path, task: int) -> Path:
    return output / "tasks" / f"{task:06d}.signed"


def _paired(output: Path, task: int) -> Path:
    return output / "tasks" / f"{task:06d}.paired"


def signature_files(output: Path, task: int) -> list[Path]:
    """What a task leaves."""
    folder = _folder(output, "signatures")
    return [folder / f"bucket_{n:03d}" / f"{task:05d}.minhash.sig" for n in range(NUM_BUCKETS)]


def pair_files(output: Path, bucket: int) -> list[Path]:
    """What is left of a bucket."""
    return [_folder(output, "pairs") / f"{bucket:05d}_00.dups"]


def mark_done(path: Path, files: Sequence[Path], **more: str) -> None:
    """Say that a task is done, and what its files then were."""
    write_atomically(path, json.dumps({"files": [file_digest(file) for file in files], **more}))


def _is_as_marked(path: Path, files: Sequence[Path]) -> Counts | None:
    try:
        told = json.loads(path.read_bytes())
        return (0, 0) if told["files"] == [file_digest(file) for file in files] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _is_signed(output: Path, task: int) -> Counts | None:
    return _is_as_marked(_signed(output, task), signature_files(output, task))


def _is_paired(output: Path, task: int) -> Counts | None:
    return _is_as_marked(_paired(output, task), pair_files(output, task))


SIGN = Stage("minhash signatures", signature_task, _signed, _is_signed)
PAIR = Stage("minhash pairs", bucket_task, _paired, _is_paired)


def bucket_tasks() -> list[Task]:
    """A task for each bucket."""
    return [Task(id, f"bucket {id}", "", 0, None, None) for id in range(NUM_BUCKETS)]


def find_near_duplicates(output: Path, tasks: Sequence[Task]) -> None:
    """Join the pairs to clusters; leaves `near.drops`, exact duplicates among them."""
    from datatrove.pipeline.dedup import minhash

    clusters = _folder(output, "clusters")
    step = minhash.MinhashDedupCluster(
        str(_folder(output, "pairs")), str(clusters), config=_config()
    )
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar of its own
        step.run(None, 0, 1)
    counts = document_counts(output, tasks)
    parts = []
    for task in tasks:
        drops = read_drops(exact_path(output), task.id).copy()
        removed = clusters / f"{task.id:06d}.remove"
        if removed.is_file():
            # datatrove counted the documents that it was given.
            given = np.flatnonzero(drops == 0)
            drops[given[np.fromfile(removed, "<u4")]] = NEAR_DUPLICATE
        parts.append(drops)
    write_drops(near_path(output), counts, np.concatenate(parts) if parts else np.zeros(0, "u1"))

"""Tokenising one piece of a corpus: idempotent, told by its record, alike on every machine.

A task reads one range of one input and leaves shards of whole blocks, the tails that filled none,
the rows it rejected, and last, by a rename, `tasks/{id}.json`. Whatever happened before, running it
again leaves the same bytes.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from pipeline.atomic import write_atomically
from pipeline.data.manifest import Shard
from pipeline.data.shards import token_layout
from pipeline.data.tokenizer import Tokenizer, load
from tools.corpus import Document, Reject, read_documents
from tools.corpus_packer import BlockPacker

TOKENIZER_FILE = "tokenizer.model"
_BATCH_CHARACTERS = 1 << 20


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
    """

    block_tokens: int
    task_bytes: int
    shard_bytes: int
    validation_fraction: float
    text_field: str
    default_source: str


@dataclass(frozen=True)
class Record:
    """What a finished task says of itself; `tasks/{id}.json`.

    `rows` counts lines that are not blank, `documents` those that became tokens, `tails` how many
    ids per split and source filled no block: the finaliser puts them, in task order, into the
    shards of task number `number of tasks`, where a document cut by the last block goes on.
    """

    id: int
    input: str
    rows: int
    documents: int
    rejects: dict[str, int]
    replaced_surrogates: int
    shards: tuple[Shard, ...]
    tails: tuple[tuple[str, str, int], ...]

    @staticmethod
    def read(path: Path) -> Record:
        """The record in file `path`."""
        fields = json.loads(path.read_bytes())
        shards = tuple(Shard(**shard) for shard in fields["shards"])
        tails = tuple((split, source, count) for split, source, count in fields["tails"])
        return Record(**{**fields, "shards": shards, "tails": tails})


def record_path(output: Path, task: int) -> Path:
    """Where the record of a task lies."""
    return output / "tasks" / f"{task:06d}.json"


def tails_path(output: Path, task: int) -> Path:
    """Where the tails of a task lie until they are joined."""
    return output / "tasks" / f"{task:06d}.tails.npz"


def rejects_path(output: Path, task: int) -> Path:
    """Where the rejected rows of a task lie until they are joined."""
    return output / "tasks" / f"{task:06d}.rejects.jsonl"


def ids_dtype(vocab_size: int) -> str:
    """The narrowest of the two dtypes that holds every id."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def split_of(text_bytes: bytes, validation_fraction: float) -> str:
    """train or validation, by the text alone: equal texts never end on both sides."""
    threshold = int(validation_fraction * 2**64)
    return "validation" if xxhash.xxh3_64_intdigest(text_bytes) < threshold else "train"


def run_task(task: Task, settings: Settings, output: Path, *, in_worker: bool = False) -> Record:
    """Tokenise one range; the record is in place when this returns.

    A worker stops when the command that started it is gone, so that a killed command's workers
    do not write beside those of the next.

    Raises:
        UserError: the input or the tokenizer cannot be read.
        InterruptedError: the command is gone.
    """
    run = _TaskRun(task, settings, output, load(output / TOKENIZER_FILE))
    run.parent = os.getppid() if in_worker else None
    return run.run()


class _TaskRun:
    """The state of one task while it runs."""

    def __init__(self, task: Task, settings: Settings, output: Path, tokenizer: Tokenizer) -> None:
        self.task, self.settings, self.output, self.tokenizer = task, settings, output, tokenizer
        self.layout = token_layout(settings.block_tokens, ids_dtype(tokenizer.vocab_size))
        self.packers: dict[tuple[str, str], BlockPacker] = {}
        self.rejects: list[Reject] = []
        self.documents = self.replaced = 0
        self.parent: int | None = None

    def run(self) -> Record:
        try:
            for batch in self._batches():
                self._encode(batch)
                if self.parent is not None and os.getppid() != self.parent:
                    raise InterruptedError("the command that started this worker is gone")
            return self._finish()
        except BaseException:
            for packer in self.packers.values():
                packer.abort()
            raise

    def _batches(self) -> Iterator[list[Document]]:
        task = self.task
        batch: list[Document] = []
        characters = 0
        rows = read_documents(Path(task.path), task.begin, task.end, self.settings.text_field)
        for row in rows:
            if isinstance(row, Reject):
                self.rejects.append(row)
                continue
            batch.append(row)
            characters += len(row.text)
            if characters >= _BATCH_CHARACTERS:
                yield batch
                batch, characters = [], 0
        if batch:
            yield batch

    def _encode(self, batch: list[Document]) -> None:
        eod = np.array([self.tokenizer.eod])
        encoded = self.tokenizer.encode_batch([document.text for document in batch])
        for document, ids in zip(batch, encoded, strict=True):
            text = document.text.encode()
            split = split_of(text, self.settings.validation_fraction)
            source = self.task.source or document.source or self.settings.default_source
            self._packer(split, source).add(np.concatenate([ids, eod]), len(text))
            self.documents += 1
            self.replaced += document.replaced_surrogates

    def _packer(self, split: str, source: str) -> BlockPacker:
        packer = self.packers.get((split, source))
        if packer is None:
            packer = BlockPacker(
                self.output, split, source, self.task.id, self.layout, self.settings.shard_bytes
            )
            self.packers[split, source] = packer
        return packer

    def _finish(self) -> Record:
        arrays: dict[str, np.ndarray] = {}
        tails: list[tuple[str, str, int]] = []
        for (split, source), packer in sorted(self.packers.items()):
            tail = packer.tail()
            if len(tail["ids"]):
                tails.append((split, source, len(tail["ids"])))
                arrays.update({f"{split}/{source}/{name}": a for name, a in tail.items()})
        if tails:
            partial = tails_path(self.output, self.task.id).with_suffix(f".{os.getpid()}.partial")
            with open(partial, "wb") as file:
                np.savez(file, **arrays)  # type: ignore[arg-type]
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, tails_path(self.output, self.task.id))
        if self.rejects:
            lines = [
                json.dumps({"file": self.task.input, "offset": r.offset, "reason": r.reason}) + "\n"
                for r in self.rejects
            ]
            write_atomically(rejects_path(self.output, self.task.id), "".join(lines))
        record = Record(
            id=self.task.id,
            input=self.task.input,
            rows=self.documents + len(self.rejects),
            documents=self.documents,
            rejects=dict(sorted(Counter(r.reason for r in self.rejects).items())),
            replaced_surrogates=self.replaced,
            shards=tuple(shard for _, p in sorted(self.packers.items()) for shard in p.shards),
            tails=tuple(tails),
        )
        fields: dict[str, Any] = dataclasses.asdict(record)
        write_atomically(record_path(self.output, self.task.id), json.dumps(fields) + "\n")
        return record

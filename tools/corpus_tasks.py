"""Tokenising one piece of a corpus: idempotent, told by its record, alike on every machine.

A task reads one range of one input and leaves shards of whole blocks, the tails that filled none,
the rows it rejected, and last, by a rename, its record. Whatever happened before, running it again
leaves the same bytes.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import IO

import numpy as np
import xxhash

from pipeline.atomic import partial_path, put_into_place
from pipeline.data.encoder import Encoder, EncodersDifferError, UncuttableError, encoder_of
from pipeline.data.manifest import shard_names
from pipeline.data.shards import token_layout
from pipeline.data.tokenizer import Tokenizer, load
from pipeline.options import UserError
from tools.corpus_packer import BlockPacker
from tools.corpus_plan import Settings, Task
from tools.corpus_records import (
    Record,
    Running,
    file_digest,
    record_path,
    rejects_path,
    running_path,
    stamp,
    tails_path,
)
from tools.corpus_rows import Document, Reject, read_documents
from tools.corpus_streams import Reading

TOKENIZER_FILE = "tokenizer.model"
CHECKED_SHARE = 256  # one document of so many is encoded by sentencepiece as well
_TELL_SECONDS = 1.0
_MAX_SOURCES = 512  # splits counted apart; each holds a block in memory


def ids_dtype(vocab_size: int) -> str:
    """The narrowest of the two dtypes that holds every id."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def split_of(text_bytes: bytes, validation_fraction: float) -> str:
    """train or validation, by the text alone: equal texts never end on both sides."""
    return _split(xxhash.xxh3_64_intdigest(text_bytes), validation_fraction)


def _split(digest: int, validation_fraction: float) -> str:
    return "validation" if digest < int(validation_fraction * 2**64) else "train"


@lru_cache(maxsize=1)
def _tokenizer(path: Path, written: int) -> Tokenizer:
    return load(path)


def run_task(task: Task, settings: Settings, output: Path, *, in_worker: bool = False) -> Record:
    """Tokenise one range; the record is in place when this returns.

    A worker stops when the command that started it is gone, so that a killed command's workers
    do not write beside those of the next.

    Raises:
        UserError: the input or the tokenizer cannot be read, or gigatoken and sentencepiece differ.
        OSError: the output cannot be written.
        InterruptedError: the command is gone.
    """
    model = output / TOKENIZER_FILE
    # A worker loads it once for all its tasks.
    tokenizer = _tokenizer(model, model.stat().st_mtime_ns if model.exists() else 0)
    run = _TaskRun(task, settings, output, encoder_of(tokenizer))
    run.parent = os.getppid() if in_worker else None
    return run.run()


def task_documents(task: Task, settings: Settings, reading: Reading) -> Iterator[Document | Reject]:
    """The documents of a task that are neither too short nor too long, and the other rows.

    Every step that counts a task's documents counts these; `reading` is of the task's range.
    """
    shortest = settings.min_characters
    longest = settings.max_characters
    for row in read_documents(
        Path(task.path),
        task.begin,
        task.end,
        settings.text_field,
        max_row_bytes=settings.max_row_bytes,
        ask_source=task.source is None,
        reading=reading,
    ):
        if isinstance(row, Document):
            if row.characters < shortest:
                row = Reject(row.offset, "too short")
            elif longest is not None and row.characters > longest:
                row = Reject(row.offset, "too long")
        yield row


class _TaskRun:
    """The state of one task while it runs."""

    def __init__(self, task: Task, settings: Settings, output: Path, encoder: Encoder) -> None:
        self.task, self.settings, self.output, self.encoder = task, settings, output, encoder
        self.eod = np.array([encoder.tokenizer.eod])
        dtype = ids_dtype(encoder.tokenizer.vocab_size)
        self.layout = token_layout(settings.block_tokens, dtype)
        self.packers: dict[tuple[str, str], BlockPacker] = {}
        self.rejects: Counter[str] = Counter()
        self.rejects_file: IO[str] | None = None
        self.seen = self.documents = self.replaced = self.tokens = 0
        self.reason_against: Callable[[Document, int], str | None] | None = None
        if settings.dedup != "none" or settings.decontaminate:
            from tools.corpus_filters import filter_of

            self.reason_against = filter_of(task.id, settings, output)
        self.parent: int | None = None
        self.reading = Reading(task.begin, task.end)
        self.names = shard_names(task.id)
        self.next_tell = 0.0

    def run(self) -> Record:
        try:
            for row in task_documents(self.task, self.settings, self.reading):
                if isinstance(row, Reject):
                    self._reject(row)
                else:
                    self._consider(row)
                if time.monotonic() > self.next_tell:
                    self._tell()
            return self._finish()
        except BaseException:
            self._abort()
            raise

    def _tell(self) -> None:
        """Say how far it is, and stop if nobody is there to hear."""
        if self.parent is not None and os.getppid() != self.parent:
            raise InterruptedError("the command that started this worker is gone")
        self.next_tell = time.monotonic() + _TELL_SECONDS
        stored = max(0, self.reading.stored_bytes() - self.task.begin)
        running = Running.here(stored, self.tokens, self.rejects.total())
        running.tell(running_path(self.output, self.task.id))

    def _consider(self, document: Document) -> None:
        reason = self.reason_against and self.reason_against(document, self.seen)
        self.seen += 1
        if reason:
            self._reject(Reject(document.offset, reason))
        else:
            self._use(document)

    def _use(self, document: Document) -> None:
        data = document.data
        digest = xxhash.xxh3_64_intdigest(data)
        check = digest % CHECKED_SHARE == 0 or self.documents == 0
        try:
            parts = self.encoder.encode(data, check=check)
            source = self.task.source or document.source or self.settings.default_source
            packer = self._packer(_split(digest, self.settings.validation_fraction), source)
            for ids in parts:
                packer.add(ids)
                self.tokens += len(ids)
        except UncuttableError:
            self._reject(Reject(document.offset, "no place to cut"))
            return
        except EncodersDifferError as error:
            raise UserError(
                f"tokenizer: gigatoken and sentencepiece differ at byte {document.offset} of "
                f"{self.task.input}: {error}; uninstall gigatoken and remove the output"
            ) from None
        packer.add(self.eod)
        packer.end_document(len(data))
        self.tokens += 1
        self.documents += 1
        self.replaced += document.replaced_surrogates

    def _packer(self, split: str, source: str) -> BlockPacker:
        packer = self.packers.get((split, source))
        if packer is None:
            if len(self.packers) >= _MAX_SOURCES:
                raise UserError(
                    f"input={self.task.input!r}: its rows name more than {_MAX_SOURCES // 2} "
                    f"sources, the last {source!r}; give inputs whose paths tell the source"
                )
            packer = BlockPacker(
                self.output, split, source, self.names, self.layout, self.settings.shard_bytes
            )
            self.packers[split, source] = packer
        return packer

    def _reject(self, row: Reject) -> None:
        self.rejects[row.reason] += 1
        if self.rejects_file is None:
            path = partial_path(rejects_path(self.output, self.task.id))
            self.rejects_file = open(path, "w", encoding="utf-8")  # noqa: SIM115
        told = {"file": self.task.input, "offset": row.offset, "reason": row.reason}
        self.rejects_file.write(json.dumps(told) + "\n")

    def _finish(self) -> Record:
        tails = self._write_tails()
        files = [tails_path(self.output, self.task.id)] if tails else []
        if self.rejects_file is not None:
            files.append(rejects_path(self.output, self.task.id))
            self.rejects_file.flush()
            os.fsync(self.rejects_file.fileno())
            self.rejects_file.close()
            put_into_place(partial_path(files[-1]), files[-1])
        record = Record(
            id=self.task.id,
            input=self.task.input,
            rows=self.documents + self.rejects.total(),
            documents=self.documents,
            tokens=self.tokens,
            rejects=dict(sorted(self.rejects.items())),
            replaced_surrogates=self.replaced,
            shards=tuple(shard for _, p in sorted(self.packers.items()) for shard in p.shards),
            tails=tuple(tails),
            files={file.name: file_digest(file) for file in files},
            read=self.reading.digest(),
        )
        record.write(record_path(self.output, self.task.id))
        stamp(record_path(self.output, self.task.id), self.reading.changed)
        return record

    def _write_tails(self) -> list[tuple[str, str, int]]:
        arrays: dict[str, np.ndarray] = {}
        tails: list[tuple[str, str, int]] = []
        for (split, source), packer in sorted(self.packers.items()):
            tail = packer.tail()
            if len(tail["ids"]):
                tails.append((split, source, len(tail["ids"])))
                arrays.update({f"{split}/{source}/{name}": a for name, a in tail.items()})
        if tails:
            path = tails_path(self.output, self.task.id)
            with open(partial_path(path), "wb") as file:
                np.savez(file, **arrays)  # type: ignore[arg-type]
                file.flush()
                os.fsync(file.fileno())
            put_into_place(partial_path(path), path)
        return tails

    def _abort(self) -> None:
        """Leave no half-written file: the room may be what is missing."""
        for packer in self.packers.values():
            packer.abort()
        partial_path(tails_path(self.output, self.task.id)).unlink(missing_ok=True)
        if self.rejects_file is not None:
            with contextlib.suppress(OSError):  # a full disk refuses what is still buffered
                self.rejects_file.close()
            partial_path(rejects_path(self.output, self.task.id)).unlink(missing_ok=True)

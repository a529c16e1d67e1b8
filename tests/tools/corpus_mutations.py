"""Damaged inputs, and what an independent reader makes of them.

For each kind, `check(mutated)` must come to its end: with a refusal in one line, or with exactly
what the independent reader finds. Everything else is a failure: another exception, a hang, a silent
difference.
"""

from __future__ import annotations

import dataclasses
import gzip
import io
import json
import random
import time
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest import mock

import numpy as np
import zstandard

from pipeline.data.manifest import FILE_NAME, Manifest, read_manifest
from pipeline.data.tokenizer import load
from pipeline.options import UserError
from tests.tools.tokenising import make_corpus, make_model, run_here
from tools.corpus_plan import Settings, Task, check_plan, plan_path
from tools.corpus_records import Record, rejects_path, tails_path
from tools.corpus_rows import Document, read_documents
from tools.corpus_tasks import TOKENIZER_FILE, run_task

SECONDS = 20.0  # for one input, on a machine that does other things as well
KINDS = ("jsonl", "zst", "gz", "task", "manifest", "plan", "record")
Outcome = str
Found = list[tuple[int, str, str]]  # offset; "text" and the text, or "reject" and the reason


def mutate(data: bytes, generator: random.Random) -> bytes:
    """One to three small damages."""
    changed = bytearray(data)
    for _ in range(generator.randint(1, 3)):
        at = generator.randrange(len(changed) + 1)
        length = generator.choice([1, 1, 2, 4, 16, 64])
        kind = generator.randrange(7)
        if kind <= 2 and at < len(changed):
            changed[at] ^= 1 << generator.randrange(8)
        elif kind == 3:
            changed[at : at + length] = generator.randbytes(min(length, len(changed) - at))
        elif kind == 4:
            del changed[at : at + length]
        elif kind == 5:
            changed[at:at] = generator.choice(
                [generator.randbytes(length), bytes(changed[:length]), b"\n", b'"', b"\\ud800"]
            )
        elif generator.random() < 0.3:
            del changed[at:]
    return bytes(changed)


def rows_of(content: bytes) -> Found:
    """What Python's own json finds, line by line."""
    found: Found = []
    offset = 0
    for line in io.BytesIO(content):
        if line.strip():
            found.append((offset, *_row(line)))
        offset += len(line)
    return found


def _row(line: bytes) -> tuple[str, str]:
    try:
        fields = json.loads(line.decode())
    except (ValueError, RecursionError):
        return "reject", "bad JSON"
    if not isinstance(fields, dict):
        return "reject", "bad JSON"
    text = fields.get("text")
    if not isinstance(text, str):
        return "reject", "no text"
    if not text:
        return "reject", "empty"
    return "text", "".join("\ufffd" if 0xD800 <= ord(c) < 0xE000 else c for c in text)


def unpacked(data: bytes, suffix: str) -> bytes:
    """The content by another way through the library; raises when that way does."""
    if suffix == ".zst":
        reader = zstandard.ZstdDecompressor().stream_reader(data, read_across_frames=True)
        return reader.read()
    if suffix != ".gz":
        return data
    parts = []
    while data:
        member = zlib.decompressobj(31)
        parts.append(member.decompress(data))
        if not member.eof:
            raise EOFError("cut")
        data = member.unused_data.lstrip(b"\0")  # padding, as gzip's own tool allows
    return b"".join(parts)


def _refused(error: UserError, named: str) -> Outcome:
    """A refusal must be one line that names what it is about."""
    assert named in str(error)
    assert "\n" not in str(error)
    return "refused"


class Kinds:
    """Every kind of damaged input, on small files in a folder of its own.

    Args:
        folder: to work in.
        model: of a tokenizer.
        shards: a finished shard folder.
    """

    def __init__(self, folder: Path, model: Path, shards: Path) -> None:
        self.folder = folder
        self.tokenizer = load(model)
        self.output = folder / "out"
        (self.output / "tasks").mkdir(parents=True)
        (self.output / FILE_NAME).touch()  # of a finished folder no input may change
        (self.output / TOKENIZER_FILE).write_bytes(model.read_bytes())
        generator = random.Random(3)
        words = ["word ", "é", "日本", "\\", '"', "\n", "<unk>", "😀", "▁"]
        rows = ["".join(generator.choices(words, k=generator.randint(1, 40))) for _ in range(12)]
        lines = [json.dumps({"text": row, "meta": {"n": [1, 2.5, None]}}) + "\n" for row in rows]
        lines[5:5] = ['{"text": "lone \\ud83d"}\n', "\n", '{"text": 3}\n']
        self.jsonl = "".join(lines).encode()
        half = len(self.jsonl) // 2
        checked = zstandard.ZstdCompressor(write_checksum=True)
        self.zst = zstandard.compress(self.jsonl[:half]) + checked.compress(self.jsonl[half:])
        self.gz = gzip.compress(self.jsonl[:half], mtime=0) + gzip.compress(self.jsonl[half:])
        self.manifest: Manifest = read_manifest(shards)
        self.manifest_bytes = (shards / FILE_NAME).read_bytes()
        self.plan_bytes = plan_path(shards).read_bytes()
        self.record_bytes = (shards / "tasks/000000.json").read_bytes()
        self.record = Record.load(shards / "tasks/000000.json")
        self.checks: dict[str, tuple[bytes, Callable[[bytes], Outcome]]] = {
            "jsonl": (self.jsonl, lambda data: self._rows(data, "")),
            "zst": (self.zst, lambda data: self._rows(data, ".zst")),
            "gz": (self.gz, lambda data: self._rows(data, ".gz")),
            "task": (self.jsonl, self._task),
            "manifest": (self.manifest_bytes, self._manifest),
            "plan": (self.plan_bytes, self._plan),
            "record": (self.record_bytes, self._record),
        }
        assert tuple(self.checks) == KINDS

    def _rows(self, data: bytes, suffix: str) -> Outcome:
        path = self.folder / f"x.jsonl{suffix}"
        path.write_bytes(data)
        found: Found = []
        try:
            for row in read_documents(path):
                told = ("text", row.text) if isinstance(row, Document) else ("reject", row.reason)
                found.append((row.offset, *told))
        except UserError as error:
            return _refused(error, str(path))
        assert found == rows_of(unpacked(data, suffix))
        return "read"

    def _task(self, data: bytes) -> Outcome:
        path = self.folder / "task.jsonl"
        path.write_bytes(data)
        settings = Settings(8192, 1, 1 << 30, 0.0, "text", "x", 1 << 20, 0, None, "none", "")
        record = run_task(
            Task(0, "task.jsonl", str(path), 0, len(data), "x"), settings, self.output
        )
        expected = rows_of(data)
        texts = [text for _, kind, text in expected if kind == "text"]
        rejects = [(offset, reason) for offset, kind, reason in expected if kind == "reject"]
        assert (record.rows, record.documents) == (len(expected), len(texts))
        assert record.rejects == Counter(reason for _, reason in rejects)
        listed = rejects_path(self.output, 0)
        rows = [json.loads(row) for row in listed.read_text().splitlines()] if rejects else []
        assert [(row["offset"], row["reason"]) for row in rows] == rejects
        if texts:
            with np.load(tails_path(self.output, 0)) as tails:
                ids, ends = tails["train/x/ids"], tails["train/x/ends"].tolist()
            begins = [0, *ends]
            decoded = [self.tokenizer.decode(ids[a : b - 1]) for a, b in zip(begins, ends)]  # noqa: B905
            assert decoded == texts
        return "read"

    def _manifest(self, data: bytes) -> Outcome:
        (self.folder / FILE_NAME).write_bytes(data)
        try:
            assert read_manifest(self.folder) == self.manifest
        except UserError as error:
            return _refused(error, "manifest")
        return "read"

    def _plan(self, data: bytes) -> Outcome:
        plan_path(self.output).write_bytes(data)
        try:
            check_plan(self.output, json.loads(self.plan_bytes))
        except UserError as error:
            return _refused(error, str(self.output))
        assert json.loads(data) == json.loads(self.plan_bytes)
        return "read"

    def _record(self, data: bytes) -> Outcome:
        path = self.folder / "record.json"
        path.write_bytes(data)
        try:
            assert dataclasses.asdict(Record.load(path)) == dataclasses.asdict(self.record)
        except ValueError:
            return "refused"
        return "read"


def make_kinds(folder: Path) -> Kinds:
    """The kinds, on a corpus, a tokenizer and shards made in `folder`."""
    made = make_originals(folder)
    (folder / "work").mkdir()
    return Kinds(folder / "work", *made)


def make_originals(folder: Path) -> tuple[Path, Path]:
    """A tokenizer and shards."""
    corpus = make_corpus(folder / "corpus", 20)
    model = make_model(corpus, folder / "spm.model")
    return model, run_here(corpus, model, folder / "shards")


@dataclasses.dataclass(frozen=True)
class Part:
    """Damaged inputs of one kind for a process of its own.

    Attributes:
        folder: to work in.
        model, shards: `make_originals`.
    """

    folder: Path
    model: Path
    shards: Path
    name: str
    count: int
    seed: int

    def fuzz(self) -> Counter[tuple[str, Outcome]]:
        """See `fuzz`."""
        self.folder.mkdir()
        kinds = Kinds(self.folder, self.model, self.shards)
        # Nothing here has to outlive the power.
        with mock.patch("os.fsync"):
            return fuzz(kinds, self.count, self.seed, [self.name])


def fuzz(
    kinds: Kinds, count: int, seed: int, names: Sequence[str] | None = None
) -> Counter[tuple[str, Outcome]]:
    """Check `count` damaged inputs of all kinds in turn; how many of each came to what."""
    generator = random.Random(seed)
    outcomes: Counter[tuple[str, Outcome]] = Counter()
    names = names or sorted(kinds.checks)
    for number in range(count):
        name = names[number % len(names)]
        original, check = kinds.checks[name]
        mutated = mutate(original, generator)
        started = time.monotonic()
        try:
            outcomes[name, check(mutated)] += 1
        except BaseException as error:
            raise AssertionError(f"{name}, input {number} of seed {seed}: {mutated!r}") from error
        assert time.monotonic() - started < SECONDS, f"{name}: {mutated!r}"
    return outcomes


def check_outcomes(outcomes: Counter[tuple[str, Outcome]]) -> None:
    """Each kind was reached, and each way out of it."""
    for name in KINDS:
        assert outcomes[name, "refused"] + outcomes[name, "read"] > 0
    for name in ("zst", "gz", "manifest", "plan", "record"):
        assert outcomes[name, "refused"] > 0, outcomes

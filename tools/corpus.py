"""Reading corpora as they lie on disk: RedPajama V1, its samples, SlimPajama, any JSONL.

A file is read from a byte to a byte: a row belongs to the range in which its first byte lies, so
ranges that tile a file give every row exactly once. Compressed files are read whole. Nothing here
loads numpy or torch.
"""

from __future__ import annotations

import gzip
import io
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from glob import glob
from os.path import commonpath
from pathlib import Path, PurePath
from typing import IO, Any

from pipeline.options import UserError

SUFFIXES = (".jsonl", ".jsonl.zst", ".jsonl.gz", ".json.gz", ".json.zst", ".ndjson")
_PROBE_BYTES = 1 << 16
_READ_BYTES = 1 << 18

# RedPajama's folders, and the names under which SlimPajama's rows and Hugging Face's loader know
# them: lower case, letters only.
_FOLDERS = ("arxiv", "book", "c4", "common_crawl", "github", "stackexchange", "wikipedia")
_ROW_NAMES = {
    **{name.replace("_", ""): name for name in _FOLDERS},
    **{f"redpajama{name.replace('_', '')}": name for name in _FOLDERS},
    "books": "book",
    "wiki": "wikipedia",
    "cc": "common_crawl",
}
# File names of RedPajama's subsets and of its 1-billion-token sample.
_FILE_NAMES = {
    r"c4[-_](train|sample)": "c4",
    r"cc_\d{4}-\d{2}_sample": "common_crawl",
    r"(filtered_|github_sample)": "github",
    r"arxiv_": "arxiv",
    r"(wiki\.|wikipedia_sample)": "wikipedia",
    r"book(\.|_sample)": "book",
    r"stackexchange(\.|_sample)": "stackexchange",
}


@dataclass(frozen=True)
class InputFile:
    """One file of a corpus.

    Attributes:
        path: where it is.
        name: its path below the deepest folder that holds all inputs, with forward slashes.
        size: bytes as stored.
    """

    path: Path
    name: str
    size: int

    @property
    def splittable(self) -> bool:
        """Whether a range of its bytes can be read alone."""
        return self.path.suffix not in (".zst", ".gz")

    def probe(self) -> str:
        """Checksum of the first and last 64 KiB, hexadecimal: cheap at any size."""
        import xxhash

        digest = xxhash.xxh3_64()
        with open(self.path, "rb") as file:
            digest.update(file.read(_PROBE_BYTES))
            file.seek(max(0, self.size - _PROBE_BYTES))
            digest.update(file.read(_PROBE_BYTES))
        return digest.hexdigest()


def find_inputs(
    patterns: Iterable[str], field: str = "input", exclude: Path | None = None
) -> list[InputFile]:
    """The files that the globs match (a folder stands for every JSONL file below it), by name.

    Files that are no JSONL by their suffix are passed over, as RedPajama's SHA256SUMS must be, and
    so is what lies in the folder `exclude` (the output).

    Raises:
        UserError: a glob that matches no such file.
    """
    found: set[Path] = set()
    for pattern in patterns:
        matches = [Path(match) for match in glob(pattern, recursive=True)]
        folders = [match for match in matches if match.is_dir() and not glob_magic(pattern)]
        for folder in folders:
            matches += folder.rglob("*")
        files = {m.resolve() for m in matches if m.name.endswith(SUFFIXES) and m.is_file()}
        if exclude is not None:
            files = {file for file in files if not file.is_relative_to(exclude.resolve())}
        if not files:
            raise UserError(
                f"{field}={pattern!r}: matches no file ending in {', '.join(SUFFIXES[:3])}; give a "
                "glob in quotes, such as 'corpus/**/*.jsonl*'"
            )
        found |= files
    root = Path(commonpath([path.parent for path in found]))
    named = [InputFile(p, p.relative_to(root).as_posix(), p.stat().st_size) for p in found]
    return sorted(named, key=lambda file: file.name)


def glob_magic(pattern: str) -> bool:
    """Whether `pattern` has wildcards."""
    return any(character in pattern for character in "*?[")


def source_of_path(path: PurePath) -> str | None:
    """The RedPajama subset that a file's name, or else one of its two last folders, tells."""
    for pattern, source in _FILE_NAMES.items():
        if re.match(pattern, path.name):
            return source
    for folder in path.parts[-2:-4:-1]:
        if folder in _FOLDERS:
            return folder
    return None


def source_of_row(row: dict[str, Any]) -> str | None:
    """The subset that a row itself tells (SlimPajama, Hugging Face's loader), as a folder name."""
    meta = row.get("meta")
    told: object = row.get("red_pajama_subset")
    if told is None and isinstance(meta, dict):
        told = meta.get("redpajama_set_name") or meta.get("red_pajama_subset")
    if not isinstance(told, str) or not told:
        return None
    letters = re.sub(r"[^a-z0-9]", "", told.lower())
    return _ROW_NAMES.get(letters) or re.sub(r"[^A-Za-z0-9_-]", "_", told)[:64].lower()


@dataclass(frozen=True)
class Row:
    """A row that parsed: its fields, and where its line begins (compressed: after unpacking)."""

    fields: dict[str, Any]
    offset: int


@dataclass(frozen=True)
class Reject:
    """A row that is not used: where its line begins, and why."""

    offset: int
    reason: str


def read_rows(path: Path, begin: int = 0, end: int | None = None) -> Iterator[Row | Reject]:
    """Rows whose line begins in [begin, end) of the file's bytes; blank lines are no rows.

    Raises:
        UserError: the file cannot be read or unpacked.
    """
    try:
        with open_stream(path) as stream:
            offset = begin
            if begin:
                stream.seek(begin - 1)
                offset += len(stream.readline()) - 1
            while end is None or offset < end:
                line = stream.readline()
                if not line:
                    break
                if not line.isspace():
                    yield parse_row(line, offset)
                offset += len(line)
    except _unpacking_errors() as error:
        raise UserError(
            f"input={str(path)!r}: cannot be read to its end ({error}); fetch the file again"
        ) from None


def _unpacking_errors() -> tuple[type[Exception], ...]:
    import zstandard

    return (OSError, EOFError, zlib.error, zstandard.ZstdError)


def open_stream(path: Path) -> IO[bytes] | gzip.GzipFile:
    """The file's bytes, unpacked by its suffix; frames and members follow one another."""
    if path.suffix == ".gz":
        return gzip.open(path, "rb")
    raw = open(path, "rb", buffering=_READ_BYTES)  # noqa: SIM115 (the caller closes it)
    if path.suffix == ".zst":
        return io.BufferedReader(_ZstdFile(raw), _READ_BYTES)
    return raw


class _ZstdFile(io.RawIOBase):
    """zstd frames one after another; unlike zstandard's own stream, a cut one raises EOFError."""

    def __init__(self, raw: IO[bytes]) -> None:
        import zstandard

        self._raw = raw
        # What `zstd --long=31` writes is read too.
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
        self._frame: Any = None
        self._packed = b""
        self._unpacked = memoryview(b"")

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._raw.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        while not self._unpacked:
            self._packed = self._packed or self._raw.read(_READ_BYTES)
            if not self._packed:
                if self._frame is not None:
                    raise EOFError("it ends inside a zstd frame")
                return 0
            if self._frame is None:
                self._frame = self._decompressor.decompressobj()
            self._unpacked = memoryview(self._frame.decompress(self._packed))
            self._packed = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame = None
        count = min(len(buffer), len(self._unpacked))
        buffer[:count] = self._unpacked[:count]
        self._unpacked = self._unpacked[count:]
        return count


def parse_row(line: bytes, offset: int) -> Row | Reject:
    """One line of JSON; orjson first, the standard library for what it is too strict about."""
    import orjson

    try:
        fields = orjson.loads(line)
    except orjson.JSONDecodeError:
        try:
            # Lone surrogates (as \uD83D alone) and NaN, which RedPajama's writers let through.
            fields = json.loads(line)
        except (ValueError, RecursionError):
            return Reject(offset, "bad JSON")
    if not isinstance(fields, dict):
        return Reject(offset, "bad JSON")
    return Row(fields, offset)


_SURROGATES = re.compile("[\ud800-\udfff]")


def replace_surrogates(text: str) -> tuple[str, int]:
    """`text` with each lone surrogate as U+FFFD, and their number."""
    if text.isascii():
        return text, 0
    return _SURROGATES.subn("\ufffd", text)


@dataclass(frozen=True)
class Document:
    """A row's text, ready for encoding.

    Attributes:
        text: without lone surrogates.
        source: what the row says, if it does.
        replaced_surrogates: how many became U+FFFD.
        offset: where its line begins.
    """

    text: str
    source: str | None
    replaced_surrogates: int
    offset: int


def read_documents(
    path: Path, begin: int = 0, end: int | None = None, text_field: str = "text"
) -> Iterator[Document | Reject]:
    """Documents of a file's range, and a `Reject` for every row that holds none."""
    for row in read_rows(path, begin, end):
        if isinstance(row, Reject):
            yield row
            continue
        text = row.fields.get(text_field)
        if not isinstance(text, str):
            yield Reject(row.offset, "no text")
        elif not text:
            yield Reject(row.offset, "empty")
        else:
            text, replaced = replace_surrogates(text)
            yield Document(text, source_of_row(row.fields), replaced, row.offset)

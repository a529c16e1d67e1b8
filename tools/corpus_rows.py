"""Rows and documents of a file's range of bytes.

A row belongs to the range in which its first byte lies, so ranges that tile a file give every row
exactly once. Compressed files are read whole. Nothing here loads numpy or torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.corpus import source_of_row
from tools.corpus_streams import Reading, open_stream, skip_line

MAX_ROW_BYTES = 64 << 20
# Of one row: parsed, an empty list of two bytes takes some hundred.
MAX_VALUES = 1 << 21
_PART_BYTES = 1 << 16
_NO_STRUCTURE = bytes(set(range(256)) - set(b'[{,"'))
_SURROGATES = re.compile("[\ud800-\udfff]")


@dataclass(slots=True)
class Row:
    """A row that parsed: its fields, and where its line begins (compressed: after unpacking)."""

    fields: dict[str, Any]
    offset: int


@dataclass(slots=True)
class Reject:
    """A row that is not used: where its line begins, and why."""

    offset: int
    reason: str


def read_rows(
    path: Path,
    begin: int = 0,
    end: int | None = None,
    max_row_bytes: int = MAX_ROW_BYTES,
    reading: Reading | None = None,
) -> Iterator[Row | Reject]:
    """Rows whose line begins in [begin, end) of the file's bytes; blank lines are no rows.

    A line over `max_row_bytes` is passed over without being held.

    Raises:
        UserError: the file cannot be read or unpacked.
    """
    with open_stream(path, reading) as stream:
        offset = begin
        if begin:
            stream.seek(begin - 1)
            offset += skip_line(stream) - 1
        while end is None or offset < end:
            line = stream.readline(max_row_bytes + 1)
            if not line:
                break
            length = len(line)
            if length > max_row_bytes and line[-1:] != b"\n":
                del line
                yield Reject(offset, "row too long")
                length += skip_line(stream)
            elif not line.isspace():
                yield parse_row(line, offset)
            offset += length


def parse_row(line: bytes, offset: int) -> Row | Reject:
    """One line of JSON; orjson first, the standard library for what it is too strict about.

    One of more than `MAX_VALUES` lists, objects and commas is not parsed, whatever it is.
    """
    import orjson

    if len(line) > MAX_VALUES and _has_many_values(line):
        return Reject(offset, "too many values")
    try:
        fields = orjson.loads(line)
    except orjson.JSONDecodeError:
        try:
            # Lone surrogates (as \uD83D alone) and NaN, which RedPajama's writers let through.
            # What some editors put before a file's first row is none of it.
            fields = json.loads(line.decode("utf-8" if offset else "utf-8-sig"))
        except (ValueError, RecursionError):
            return Reject(offset, "bad JSON")
    if not isinstance(fields, dict):
        return Reject(offset, "bad JSON")
    return Row(fields, offset)


def _has_many_values(line: bytes) -> bool:
    if sum(map(line.count, (b"[", b"{", b","))) <= MAX_VALUES:
        return False
    # A long text may have as many commas: what stands inside of quotes is none.
    bare = line.replace(b"\\\\", b"").replace(b'\\"', b"").translate(None, _NO_STRUCTURE)
    found = inside = 0
    for begin in range(0, len(bare), _PART_BYTES):
        parts = bare[begin : begin + _PART_BYTES].split(b'"')
        found += sum(map(len, parts[inside::2]))
        inside ^= len(parts) - 1 & 1
    return found > MAX_VALUES


def replace_surrogates(text: str) -> tuple[str, int]:
    """`text` with each lone surrogate as U+FFFD, and their number."""
    if text.isascii():
        return text, 0
    return _SURROGATES.subn("\ufffd", text)


@dataclass(slots=True)
class Document:
    """A row's text, ready for encoding.

    Attributes:
        data: the text in UTF-8, each lone surrogate of the row's as U+FFFD.
        characters: of it.
        source: what the row says, if it was asked and does.
        replaced_surrogates: how many there were.
        offset: where its line begins.
    """

    data: bytes
    characters: int
    source: str | None
    replaced_surrogates: int
    offset: int

    @property
    def text(self) -> str:
        """The text."""
        return self.data.decode()


def read_documents(
    path: Path,
    begin: int = 0,
    end: int | None = None,
    text_field: str = "text",
    *,
    max_row_bytes: int = MAX_ROW_BYTES,
    ask_source: bool = True,
    reading: Reading | None = None,
) -> Iterator[Document | Reject]:
    """Documents of a file's range, and a `Reject` for every row that holds none.

    Args:
        ask_source: whether a row is asked for its source.
        reading: tells how far the file was read, and what of it.
    """
    for row in read_rows(path, begin, end, max_row_bytes, reading):
        if isinstance(row, Reject):
            yield row
            continue
        text = row.fields.get(text_field)
        if not isinstance(text, str):
            yield Reject(row.offset, "no text")
        elif not text:
            yield Reject(row.offset, "empty")
        else:
            source = source_of_row(row.fields) if ask_source else None
            replaced = 0
            try:
                data = text.encode()
            except UnicodeEncodeError:
                text, replaced = replace_surrogates(text)
                data = text.encode()
            document = Document(data, len(text), source, replaced, row.offset)
            del row, text  # a long one is not held twice while it is encoded
            yield document

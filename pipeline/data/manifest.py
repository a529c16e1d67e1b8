"""`DIR/manifest.json`: what a shard folder holds, written last, so that its presence means done.

One dataclass per thing counted; the fingerprint is the SHA-256 over all of it, so that a run can
name its data in one word. Nothing in it depends on where the folder or its inputs lie.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

import orjson

from pipeline.atomic import write_atomically
from pipeline.options import UserError

FORMAT = 1
FILE_NAME = "manifest.json"
TOKENIZER_NAME = "tokenizer.model"
Row = TypeVar("Row", "Shard", "Input")


@dataclasses.dataclass(frozen=True)
class Shard:
    """One tar.

    Attributes:
        path: relative to the folder, with forward slashes.
        split: train, validation (or heldout in a FLAN folder).
        source: the corpus it comes from, such as github (or a FLAN mixture's part).
        samples: blocks in it.
        tokens: ids in it, padding not counted. Only the last block of a source and split is padded:
            its valid length is `tokens - (samples - 1) * block_tokens`.
        documents: documents that end in it (FLAN: rows).
        text_bytes: UTF-8 bytes of the documents that end in it (FLAN: of its targets).
        bytes: size of the file.
        sha256: of the file, hexadecimal.
    """

    path: str
    split: str
    source: str
    samples: int
    tokens: int
    documents: int
    text_bytes: int
    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Input:
    """One input file.

    Attributes:
        path: relative to the deepest folder that holds all inputs.
        size: bytes as stored.
        probe: checksum of its first and last 64 KiB, hexadecimal; tells changed inputs cheaply.
        rows: lines read, blank ones not counted.
        documents: rows that became tokens.
        rejects: rows that did not, by reason.
        replaced_surrogates: lone surrogates that became U+FFFD.
        truncated: FLAN rows whose inputs or targets were longer than allowed.
    """

    path: str
    size: int
    probe: str
    rows: int
    documents: int
    rejects: dict[str, int]
    replaced_surrogates: int
    truncated: int = 0


@dataclasses.dataclass(frozen=True)
class TokenizerInfo:
    """The tokenizer of a shard folder: hexadecimal SHA-256 of its file, ids and special ids."""

    sha256: str
    vocab_size: int
    special_ids: dict[str, int]


@dataclasses.dataclass(frozen=True)
class Manifest:
    """All of `manifest.json`.

    Attributes:
        kind: "tokens", or "flan" for inputs and targets.
        dtype: of the ids, uint16 or uint32.
        block_tokens: ids in a sample.
        settings: what else the output depends on (validation_fraction, task_bytes, …).
    """

    kind: str
    dtype: str
    block_tokens: int
    tokenizer: TokenizerInfo
    settings: dict[str, Any]
    shards: tuple[Shard, ...]
    inputs: tuple[Input, ...]
    format: int = FORMAT

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over everything else, hexadecimal."""
        return _fingerprint(dataclasses.asdict(self))

    def select(self, split: str, source: str | None = None) -> tuple[Shard, ...]:
        """The shards of one split (and source), in task order."""
        return tuple(self._grouped.get((split, source), ()))

    @cached_property
    def _grouped(self) -> dict[tuple[str, str | None], list[Shard]]:
        """The shards of each (split, source), and of each (split, None)."""
        grouped: dict[tuple[str, str | None], list[Shard]] = {}
        for shard in self.shards:
            grouped.setdefault((shard.split, None), []).append(shard)
            grouped.setdefault((shard.split, shard.source), []).append(shard)
        return grouped

    def splits(self) -> tuple[str, ...]:
        """Names of the splits, sorted."""
        return tuple(sorted({split for split, _ in self._grouped}))

    def sources(self, split: str) -> tuple[str, ...]:
        """Names of the sources of one split, sorted."""
        return tuple(sorted({s for of, s in self._grouped if of == split and s is not None}))


def shard_names(task: int) -> Iterator[str]:
    """Names of the shards that a task makes, one after another, of whatever split and source.

    No two shards of a folder are called alike, so that one in the place of another is told by the
    keys in it, which begin with its name.
    """
    return (f"shard-{task:06d}-{part:03d}.tar" for part in count())


def read_manifest(folder: str | Path) -> Manifest:
    """The manifest of `folder`.

    Raises:
        UserError: the folder or manifest is absent, damaged, or of another format.
    """
    path = Path(folder) / FILE_NAME
    try:
        fields = _parsed(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"data={str(folder)!r}: no {FILE_NAME} in it, so it is no finished shard folder; "
            "give the --output of isoflop tokenize (or isoflop flan), run to its end"
        ) from None
    except (ValueError, OSError) as error:
        raise UserError(
            f"data={str(folder)!r}: cannot read its {FILE_NAME} ({error}); write it anew"
        ) from None
    if not isinstance(fields, dict) or fields.get("format") != FORMAT:
        found = fields.get("format") if isinstance(fields, dict) else None
        raise UserError(
            f"data={str(folder)!r}: its {FILE_NAME} has format {found!r}, this version reads "
            f"{FORMAT}; tokenise again"
        )
    recorded = fields.pop("fingerprint", None)
    try:
        manifest = _from_fields(fields) if _is_intact(fields, recorded) else None
    except (AttributeError, TypeError, KeyError, ValueError):
        manifest = None
    if manifest is None:
        raise UserError(
            f"data={str(folder)!r}: its {FILE_NAME} does not match its own fingerprint; "
            "it was edited or damaged: restore it or tokenise again"
        )
    # Known, and costly to work out anew.
    manifest.__dict__["fingerprint"] = recorded
    return manifest


def _parsed(text: bytes) -> Any:
    try:
        return orjson.loads(text)
    except ValueError:
        # It takes no lone surrogates, which names of files may hold; json also says what is wrong.
        return json.loads(text)


def _fingerprint(fields: Mapping[str, Any]) -> str:
    canonical = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _is_intact(fields: Mapping[str, Any], recorded: object) -> bool:
    """Whether `fields` are those whose fingerprint was recorded."""
    try:
        # The same text in a tenth of the time, unless it holds more than ASCII or rare floats.
        quick = orjson.dumps(fields, option=orjson.OPT_SORT_KEYS)
    except TypeError:
        quick = b""
    return hashlib.sha256(quick).hexdigest() == recorded or _fingerprint(fields) == recorded


def _rows(kind: type[Row], rows: Sequence[dict[str, Any]]) -> tuple[Row, ...]:
    """A frozen dataclass of each dictionary; its own __init__, field by field, takes five times."""
    names = {field.name for field in dataclasses.fields(kind)}
    made = []
    for row in rows:
        if row.keys() != names:
            raise ValueError(f"fields {sorted(row)}, expected {sorted(names)}")
        one = object.__new__(kind)
        one.__dict__.update(row)
        made.append(one)
    return tuple(made)


def _from_fields(fields: Mapping[str, Any]) -> Manifest:
    shards = _rows(Shard, fields["shards"])
    for shard in shards:
        if shard.path[:1] == "/" or ".." in shard.path.split("/") or not shard.path.strip("./"):
            raise ValueError(f"shard path {shard.path!r} leaves the folder")
    return Manifest(
        **{
            **fields,
            "tokenizer": TokenizerInfo(**fields["tokenizer"]),
            "shards": shards,
            "inputs": _rows(Input, fields["inputs"]),
        }
    )


def manifest_text(manifest: Manifest) -> str:
    """What `manifest.json` holds, to the byte."""
    fields = {**dataclasses.asdict(manifest), "fingerprint": manifest.fingerprint}
    return json.dumps(fields, indent=1, sort_keys=True) + "\n"


def write_manifest(folder: str | Path, manifest: Manifest) -> None:
    """Write `manifest.json` into `folder`, atomically."""
    write_atomically(Path(folder) / FILE_NAME, manifest_text(manifest))


def check_folder(folder: str | Path) -> Manifest:
    """The manifest of `folder`, whose files are there as it says: sizes, and the tokenizer's hash.

    Raises:
        UserError: naming the first file that is missing, of another size, or another tokenizer.
    """
    from pipeline.data.remote import cache_of

    manifest = read_manifest(folder)
    cache = cache_of(folder)
    if cache is not None and (wrong := cache.check_sizes(manifest.shards)) is not None:
        raise UserError(f"data={cache.url!r}: {wrong}; restore it or tokenise again")
    for shard in manifest.shards if cache is None else ():
        path = Path(folder) / shard.path
        size = path.stat().st_size if path.exists() else None
        if size != shard.bytes:
            found = "is missing" if size is None else f"has {size} bytes instead of {shard.bytes}"
            raise UserError(
                f"data={str(folder)!r}: shard {shard.path} {found}; restore it or tokenise again"
            )
    tokenizer = Path(folder) / TOKENIZER_NAME
    try:
        digest = hashlib.sha256(tokenizer.read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(
            f"data={str(folder)!r}: {TOKENIZER_NAME} cannot be read ({error.strerror}); restore it"
        ) from error
    if digest != manifest.tokenizer.sha256:
        raise UserError(
            f"data={str(folder)!r}: its {TOKENIZER_NAME} is not the one that made its shards; "
            "restore that, or tokenise again"
        )
    return manifest

"""`isoflop audit`: proves a shard or FLAN folder byte for byte, or names what is wrong in it."""

from __future__ import annotations

import json
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING

from pipeline.options import UserError, option

if TYPE_CHECKING:
    from pipeline.data.manifest import Manifest
    from tools.audit_place import Place
    from tools.audit_shard import Expected, Result

_REJECTS = "rejects.jsonl"


@dataclass(frozen=True)
class Options:
    """Prove a shard folder or FLAN folder: every byte, hash, count and id; decode samples of it.

    Reads everything once: each shard's SHA-256, the checksum of every 4 KiB, every tar and array
    header and all padding; counts tokens, documents and text bytes; looks for ids outside the
    vocabulary and for files that should not be there; decodes samples with the folder's own
    tokenizer and encodes them again. One line for each finding. The exit code is 0 when nothing
    was found, 1 when something was, 2 for a mistake in the command.
    """

    dir: str = option("a finished shard or FLAN folder, or its URL", positional=True, metavar="DIR")
    workers: int = option("processes (0: one for each core)", 0, minimum=0)
    decode: int = option("samples of each shard whose text is decoded", 2, minimum=0)


def run(options: Options) -> None:
    """Audit the folder; exits with 1 where something was found."""
    findings = 0
    for finding in audit(options):
        print(finding, flush=True)
        findings += 1
    if findings:
        print(f"{options.dir}: {findings} finding{'s' if findings > 1 else ''}", file=sys.stderr)
        sys.exit(1)


def audit(options: Options) -> Iterator[str]:
    """Every finding, as a line that begins with the file it is in; a summary where none is.

    Raises:
        UserError: there is no finished folder.
    """
    from tools.audit_place import audited_place

    with audited_place(options.dir) as place:
        yield from _audit(place, options)


def _audit(place: Place, options: Options) -> Iterator[str]:
    from pipeline.data.manifest import FILE_NAME, manifest_text, read_manifest

    try:
        manifest = read_manifest(place.near)
    except UserError as error:
        yield f"{FILE_NAME}: {error} (nothing else can be proved)"
        return
    found = False
    tokenizer_is_right = True
    if (place.near / FILE_NAME).read_bytes() != manifest_text(manifest).encode():
        found = True
        yield f"{FILE_NAME}: means what it should, but is not written as isoflop writes it"
    for name, finding in folder_findings(place, manifest):
        found = True
        tokenizer_is_right &= not name.startswith("tokenizer")
        yield f"{name}: {finding}"
    tasks = expected_shards(place, manifest, options, tokenizer_is_right)
    results: list[Result] = []
    for result in _results(tasks, options.workers):
        results.append(result)
        for finding in result.findings:
            found = True
            yield f"{result.path}: {finding}"
        if result.left_out:
            yield f"{result.path}: {result.left_out} more findings"
    if not found:
        for finding in text_findings(manifest, results):
            found = True
            yield finding
    if not found:
        print(summary(options.dir, results))


def folder_findings(place: Place, manifest: Manifest) -> Iterator[tuple[str, str]]:
    """(file, finding) of what can be said without reading shards."""
    from pipeline.data.manifest import FILE_NAME

    yield from _tokenizer_findings(place.near, manifest)
    paths = [shard.path for shard in manifest.shards]
    for path, count in Counter(paths).items():
        if count > 1:
            yield path, f"stands {count} times in the manifest"
    for shard in manifest.shards:
        if PurePosixPath(shard.path).parts[:-1] != (shard.split, shard.source):
            yield shard.path, f"is of {shard.split}/{shard.source} by the manifest"
    known = {FILE_NAME, *paths}
    for name in place.names(sorted({*manifest.splits(), "train", "validation", "heldout"})):
        if name not in known:
            yield name, "is not in the manifest; remove it"
    rows = sum(item.rows for item in manifest.inputs)
    rejected = Counter(
        {(item.path, why): n for item in manifest.inputs for why, n in item.rejects.items()}
    )
    rejects = rejected.total()
    used = sum(item.documents for item in manifest.inputs)
    stored = sum(shard.documents for shard in manifest.shards)
    if rows != used + rejects:
        yield FILE_NAME, f"{rows} rows were read, {used} used and {rejects} rejected"
    if manifest.inputs and used != stored:
        yield FILE_NAME, f"{used} rows were used, {stored} documents are in shards"
    try:
        listed = place.read(_REJECTS, lambda file, size: _listed(file))
    except FileNotFoundError:
        return
    except OSError as error:
        yield _REJECTS, f"cannot be read ({error.strerror})"
        return
    if listed.total() != rejects:
        yield _REJECTS, f"{listed.total()} lines, the manifest counts {rejects} rejected rows"
    elif (other := listed - rejected).total():
        (name, why), count = other.most_common(1)[0]
        told = f"lists {listed[name, why]} rows of {name!r} as {why!r}"
        yield _REJECTS, f"{told}, the manifest counts {rejected[name, why]}"


def _listed(file: IO[bytes]) -> Counter[tuple[str, str]]:
    """Rejected rows by file and reason; a line that says neither counts as what it is."""
    found: Counter[tuple[str, str]] = Counter()
    for line in file:
        try:
            row = json.loads(line)
            found[str(row["file"]), str(row["reason"])] += isinstance(row["offset"], int)
        except (ValueError, KeyError, TypeError):
            found["", line[:80].decode(errors="replace").rstrip()] += 1
    return found


def _tokenizer_findings(folder: Path, manifest: Manifest) -> Iterator[tuple[str, str]]:
    from pipeline.data.manifest import TOKENIZER_NAME
    from pipeline.data.tokenizer import load

    try:
        tokenizer = load(folder / TOKENIZER_NAME)
    except UserError as error:
        yield TOKENIZER_NAME, str(error)
        return
    told = manifest.tokenizer
    if tokenizer.sha256 != told.sha256:
        yield TOKENIZER_NAME, f"sha256 is {tokenizer.sha256}, the manifest says {told.sha256}"
        return
    if tokenizer.vocab_size != told.vocab_size:
        yield (
            TOKENIZER_NAME,
            f"has {tokenizer.vocab_size} ids, the manifest says {told.vocab_size}",
        )
    if tokenizer.special_ids != told.special_ids:
        yield (
            TOKENIZER_NAME,
            f"has the special ids {tokenizer.special_ids}, the manifest says {told.special_ids}",
        )


def expected_shards(
    place: Place, manifest: Manifest, options: Options, tokenizer_is_right: bool
) -> list[Expected]:
    """One task a shard."""
    from pipeline.data.manifest import TOKENIZER_NAME
    from tools.audit_shard import Expected

    last = {(shard.split, shard.source): shard for shard in manifest.shards}
    return [
        Expected(
            place=place,
            shard=shard,
            kind=manifest.kind,
            layout=(manifest.block_tokens, manifest.dtype),
            padded=shard is last[shard.split, shard.source],
            vocab_size=manifest.tokenizer.vocab_size,
            tokenizer=place.near / TOKENIZER_NAME if tokenizer_is_right else None,
            decode=options.decode,
        )
        for shard in manifest.shards
    ]


def _results(tasks: list[Expected], workers: int) -> Iterator[Result]:
    """Results in the order of the tasks, progress shown on stderr."""
    from tools.audit_content import audit_shard
    from tools.check_progress import CheckProgress
    from tools.worker_pool import in_order

    progress = CheckProgress("audit", sum(task.shard.bytes for task in tasks) / 1e6)
    done = findings = 0
    try:
        for result in in_order(audit_shard, tasks, workers):
            done += result.bytes
            findings += len(result.findings)
            progress.show(done / 1e6, findings)
            yield result
    finally:
        progress.close()


def text_findings(manifest: Manifest, results: Iterable[Result]) -> Iterator[str]:
    """Where a source's ids do not stand for as many bytes as its documents had.

    A document may begin in one shard and end in another, which counts it: only sums are compared.
    """
    found: defaultdict[tuple[str, str], int] = defaultdict(int)
    told: defaultdict[tuple[str, str], int] = defaultdict(int)
    for shard, result in zip(manifest.shards, results, strict=True):
        if result.text_bytes is None:
            return
        found[shard.split, shard.source] += result.text_bytes
        told[shard.split, shard.source] += shard.text_bytes
    for (split, source), count in found.items():
        if count != told[split, source]:
            yield (
                f"{split}/{source}: its ids stand for {count} bytes of text, the manifest says "
                f"{told[split, source]}"
            )


def summary(folder: str, results: list[Result]) -> str:
    """One line on a folder in which nothing was found."""
    return (
        f"{folder}: {len(results):,} shards, {sum(r.bytes for r in results) / 1e6:,.1f} MB, "
        f"{sum(r.tokens for r in results):,} tokens, {sum(r.documents for r in results):,} "
        f"documents: all as the manifest says; {sum(r.decoded for r in results):,} texts decoded "
        "and encoded again"
    )

"""What one shard must be, byte for byte, and every way in which it is not."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO

import numpy as np

from pipeline.data.manifest import Shard
from pipeline.data.shards import (
    CHECKSUMS,
    CHUNK_BYTES,
    SampleLayout,
    checksums,
    key_prefix,
    member_head,
)
from tools.audit_place import Place

MOST_FINDINGS = 20  # of one shard; a shard that lost its middle would tell thousands


@dataclass(frozen=True)
class Expected:
    """One shard's task for a worker.

    Attributes:
        place: the shard folder.
        shard: what the manifest says of it.
        kind: "tokens" or "flan".
        layout: (block_tokens, dtype).
        padded: whether it ends its split and source, so that its last block may be padded.
        vocab_size: ids lie below it.
        tokenizer: the model's file, or None where it is not the manifest's and proves nothing.
        decode: samples whose text is decoded and encoded again.
    """

    place: Place
    shard: Shard
    kind: str
    layout: tuple[int, str]
    padded: bool
    vocab_size: int
    tokenizer: Path | None
    decode: int


@dataclass
class Result:
    """What was found wrong with one shard, and what was counted in it.

    Attributes:
        findings: one line each, without the shard's name.
        damaged: whether a sample is not as it was written: then nothing was counted in it.
        text_bytes: UTF-8 bytes that its ids stand for; None where the tokenizer cannot say.
        decoded: documents (FLAN: rows) that were decoded and came back when encoded again.
    """

    path: str
    findings: list[str] = field(default_factory=list)
    left_out: int = 0
    damaged: bool = False
    bytes: int = 0
    tokens: int = 0
    documents: int = 0
    text_bytes: int | None = None
    decoded: int = 0

    def add(self, finding: str) -> None:
        """Note one finding, unless there are too many already."""
        if len(self.findings) < MOST_FINDINGS:
            self.findings.append(finding)
        else:
            self.left_out += 1


@dataclass(frozen=True)
class Sample:
    """One sample as stored: its key and the arrays of its members, checksums included."""

    number: int
    key: str
    arrays: dict[str, np.ndarray]


def read_shard(
    file: IO[bytes],
    size: int,
    layout: SampleLayout,
    shard: Shard,
    result: Result,
    consume: Callable[[Sample], None],
) -> None:
    """Go through the file once; `consume` gets each sample that is as it was written."""
    digest = hashlib.sha256()
    if size != shard.bytes or size != layout.shard_bytes(shard.samples):
        result.add(
            f"{'truncated: ' if size < shard.bytes else ''}{size} bytes, the manifest says "
            f"{shard.bytes}, {shard.samples} samples make {layout.shard_bytes(shard.samples)}"
        )
    prefix = key_prefix(PurePosixPath(shard.path))
    for number in range(shard.samples):
        data = file.read(layout.sample_bytes)
        digest.update(data)
        result.bytes += len(data)
        key = f"{prefix}-{number:06d}"
        if len(data) < layout.sample_bytes:
            result.add(f"ends inside sample {key}, {shard.samples - number} samples missing")
            result.damaged = True
            break
        begin = number * layout.sample_bytes
        wrong = list(sample_findings(data, layout, key, begin))
        for finding in wrong:
            result.add(finding)
        if wrong:
            result.damaged = True
        else:
            consume(Sample(number, key, _arrays(data, layout)))
    while rest := file.read(1 << 20):
        digest.update(rest)
        if any(rest):
            at = result.bytes + next(i for i, byte in enumerate(rest) if byte)
            result.add(f"byte {at}: the end of the archive holds more than zeros")
        result.bytes += len(rest)
    if digest.hexdigest() != shard.sha256:
        result.add(f"sha256 is {digest.hexdigest()}, the manifest says {shard.sha256}")


def _arrays(data: bytes, layout: SampleLayout) -> dict[str, np.ndarray]:
    return {
        member.name: np.frombuffer(
            data, member.dtype, member.data_bytes // np.dtype(member.dtype).itemsize,
            layout.data_offset[member.name],
        ).reshape(member.shape)
        for member in layout.members
    }  # fmt: skip


def sample_findings(data: bytes, layout: SampleLayout, key: str, begin: int) -> Iterator[str]:
    """Everything in a stored sample that is not as `ShardWriter` writes it.

    `begin` is where the sample lies in the file: findings name bytes of the file.
    """
    arrays = _arrays(data, layout)
    stored = arrays[CHECKSUMS]
    end = 0
    for member in layout.members:
        place = f"sample {key}, {member.name}"
        head = member_head(f"{key}.{member.name}", member)
        offset = layout.data_offset[member.name]
        if any(data[end : offset - len(head)]):
            yield f"{place}: the padding before it, at byte {begin + end}, is not zero"
        if data[offset - len(head) : offset] != head:
            at = offset - len(head)
            wrong = next(i for i in range(len(head)) if data[at + i] != head[i])
            what = "tar header" if wrong < len(head) - len(member.header) else ".npy header"
            yield f"{place}: its {what} differs at byte {begin + at + wrong}"
        end = offset + member.data_bytes
        if member.name == CHECKSUMS:
            continue
        first = layout.first_chunk[member.name]
        found = np.array(checksums(arrays[member.name]), np.uint64)
        for chunk in np.flatnonzero(found != stored[first : first + member.num_chunks]).tolist():
            at = begin + offset + chunk * CHUNK_BYTES
            yield f"{place}: 4 KiB block {chunk}, at byte {at}, and its checksum do not agree"
    if any(data[end:]):
        yield f"sample {key}: the padding behind it, at byte {begin + end}, is not zero"

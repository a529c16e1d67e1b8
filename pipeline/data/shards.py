"""Tars of fixed-size samples: WebDataset's layout, where every offset is arithmetic.

A sample is a few arrays in NumPy's .npy format, `{key}.{member}` in a ustar archive. As every
sample of a shard has the same members with the same shapes, sample `i` begins at byte
`i * layout.sample_bytes`, and a slice of it is a memory-mapped read. One member, `xxh3.npy`, holds
a checksum (XXH3, 64 bit) for every 4 KiB of the members before it, so that exactly what is read is
verified.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import math
import mmap
import os
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePath, PurePosixPath

import numpy as np
import xxhash

from pipeline.atomic import make_folder, partial_path, put_into_place
from pipeline.options import UserError

CHUNK_BYTES = 4096
CHECKSUMS = "xxh3.npy"
_TAR_BLOCK = 512


class CorruptShardError(UserError):
    """What is stored is not what was written; names shard, key and byte."""


@dataclass(frozen=True)
class Member:
    """One array of every sample: its name after the key's dot, dtype and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @cached_property
    def header(self) -> bytes:
        """The .npy header."""
        buffer = io.BytesIO()
        description = {"descr": np.dtype(self.dtype).str, "fortran_order": False}
        np.lib.format.write_array_header_1_0(buffer, {**description, "shape": self.shape})
        return buffer.getvalue()

    @cached_property
    def data_bytes(self) -> int:
        """Size of the array without the header."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    @property
    def num_chunks(self) -> int:
        """Number of 4 KiB checksums over it."""
        return -(-self.data_bytes // CHUNK_BYTES)


class SampleLayout:
    """Where each member lies in a sample. The checksums' member is added here.

    Attributes:
        members: in the order in which they are stored, checksums last.
        data_offset: member name to the first byte of its data, from the sample's beginning.
        first_chunk: member name to the index of its first checksum.
        sample_bytes: size of a sample in the archive.
    """

    def __init__(self, members: Sequence[Member]) -> None:
        num_chunks = sum(member.num_chunks for member in members)
        self.members = (*members, Member(CHECKSUMS, "uint64", (num_chunks,)))
        self.by_name = {member.name: member for member in self.members}
        self.data_offset: dict[str, int] = {}
        self.first_chunk: dict[str, int] = {}
        position = chunk = 0
        for member in self.members:
            self.data_offset[member.name] = position + _TAR_BLOCK + len(member.header)
            self.first_chunk[member.name] = chunk
            chunk += member.num_chunks
            stored = len(member.header) + member.data_bytes
            position += _TAR_BLOCK + -(-stored // _TAR_BLOCK) * _TAR_BLOCK
        self.sample_bytes = position

    def shard_bytes(self, samples: int) -> int:
        """Size of a tar of that many samples, end marker and record padding included."""
        content = samples * self.sample_bytes + 2 * _TAR_BLOCK
        return -(-content // tarfile.RECORDSIZE) * tarfile.RECORDSIZE


def token_layout(block_tokens: int, dtype: str) -> SampleLayout:
    """The layout of pretraining shards: `tokens.npy` [block_tokens] and its checksums."""
    return SampleLayout([Member("tokens.npy", dtype, (block_tokens,))])


def member_head(name: str, member: Member) -> bytes:
    """All that stands in the archive before the data of the member called `name`."""
    info = tarfile.TarInfo(name)
    info.size = len(member.header) + member.data_bytes
    info.mtime, info.mode = 0, 0o644
    return info.tobuf(tarfile.USTAR_FORMAT) + member.header


def checksums(array: np.ndarray) -> list[int]:
    """XXH3 of every 4 KiB of the array's bytes."""
    data = np.ascontiguousarray(array).data.cast("B")
    return [
        xxhash.xxh3_64_intdigest(data[start : start + CHUNK_BYTES])
        for start in range(0, len(data), CHUNK_BYTES)
    ]


@dataclass(frozen=True)
class WrittenShard:
    """What `ShardWriter.close` returns: samples, bytes and hexadecimal SHA-256 of the file."""

    samples: int
    bytes: int
    sha256: str


def key_prefix(path: PurePath) -> str:
    """What the keys of a shard's samples begin with: its file's name without `shard-`."""
    return path.name.removeprefix("shard-").removesuffix(".tar")


class ShardWriter:
    """Writes one shard under a temporary name; `close` renames it into place."""

    def __init__(self, path: Path, layout: SampleLayout) -> None:
        self.path = path
        self.layout = layout
        self.samples = 0
        self._key_prefix = key_prefix(path)
        self._hash = hashlib.sha256()
        make_folder(path.parent)
        self._partial = partial_path(path)
        self._file = open(self._partial, "wb")  # noqa: SIM115 (closed by close or abort)

    def add(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Append a sample: an array for every member but the checksums."""
        sums: list[int] = []
        key = f"{self._key_prefix}-{self.samples:06d}"
        for member in self.layout.members:
            if member.name == CHECKSUMS:
                array = np.array(sums, np.uint64)
            else:
                array = np.ascontiguousarray(arrays[member.name], dtype=member.dtype)
                sums += checksums(array)
            if array.shape != member.shape:
                raise ValueError(f"{member.name}: shape {array.shape}, expected {member.shape}")
            self._write_member(f"{key}.{member.name}", member, array)
        self.samples += 1

    def _write_member(self, name: str, member: Member, array: np.ndarray) -> None:
        head = member_head(name, member)
        self._write(head)
        self._write(array.data.cast("B"))
        self._write(bytes(-(len(head) + member.data_bytes) % _TAR_BLOCK))

    def _write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._hash.update(data)

    def close(self) -> WrittenShard:
        """End the archive and rename it into place; all of it is on disk when this returns."""
        size = self.layout.shard_bytes(self.samples)
        self._write(bytes(size - self.samples * self.layout.sample_bytes))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        put_into_place(self._partial, self.path)
        return WrittenShard(self.samples, size, self._hash.hexdigest())

    def abort(self) -> None:
        """Remove what was written."""
        with contextlib.suppress(OSError):  # a full disk refuses what is still buffered
            self._file.close()
        self._partial.unlink(missing_ok=True)


class ShardReader:
    """Memory-mapped, verified slices of one shard.

    Args:
        path: of the file.
        layout: of its samples.
        samples: how many the manifest says.
        name: the shard's path in the manifest; by default `path` is called like the shard.

    Attributes:
        view, words64: the whole file as bytes and as 8-byte words; unverified.

    Raises:
        CorruptShardError: the file is absent, has another size, does not begin like a sample, or
            is another shard's.
    """

    def __init__(
        self, path: Path, layout: SampleLayout, samples: int, name: str | None = None
    ) -> None:
        self.path = path
        self.layout = layout
        self.samples = samples
        expected = layout.shard_bytes(samples)
        try:
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size != expected:
                    raise CorruptShardError(
                        f"shard {path}: {size} bytes, the manifest says {expected}; restore it or "
                        "tokenise again"
                    )
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise CorruptShardError(
                f"shard {path}: cannot be opened ({error.strerror}); restore it or tokenise again"
            ) from None
        # Random order reads one slice here and there: read-ahead of neighbours is wasted.
        self._map.madvise(mmap.MADV_RANDOM)
        self.view = memoryview(self._map)
        first = layout.members[0]
        # Tars are whole 512-byte blocks, and .npy data begin at multiples of 64.
        self.words64 = self.view.cast("Q")
        begin = layout.data_offset[first.name] - len(first.header)
        if samples and self.view[begin : begin + len(first.header)] != first.header:
            raise CorruptShardError(
                f"shard {path}: byte {begin} is not the header of an array of {first.shape} "
                f"{first.dtype}; restore it or tokenise again"
            )
        # A shard of the same size in this one's place would pass every checksum.
        key = f"{key_prefix(PurePosixPath(name or path))}-{0:06d}"
        if samples and self.key(0) != key:
            raise CorruptShardError(
                f"shard {path}: its first sample is {self.key(0)!r} instead of {key!r}: the file "
                "is another shard's, or damaged; restore it or tokenise again"
            )

    def key(self, sample: int) -> str:
        """Key of a sample, read from the archive."""
        begin = sample * self.layout.sample_bytes
        name = bytes(self.view[begin : begin + 100]).split(b"\0")[0].decode("ascii", "replace")
        return name.partition(".")[0]

    def corrupt(self, byte: int) -> CorruptShardError:
        """The error for the 4 KiB at `byte` of the file."""
        sample, inside = divmod(byte, self.layout.sample_bytes)
        begins = [m.name for m in self.layout.members if self.layout.data_offset[m.name] <= inside]
        return CorruptShardError(
            f"shard {self.path}: sample {self.key(sample)}, {begins[-1]}: the 4 KiB at byte "
            f"{byte} of the file fail their checksum; restore the shard or tokenise again"
        )

    def will_need(self, begin: int, end: int) -> None:
        """Ask the kernel to bring bytes [begin, end) into memory, without waiting for it."""
        page = begin // mmap.PAGESIZE * mmap.PAGESIZE
        self._map.madvise(mmap.MADV_WILLNEED, page, min(end, len(self._map)) - page)

    def read(
        self, sample: int, member: str, start: int = 0, count: int | None = None
    ) -> np.ndarray:
        """`count` items (along the first axis) of a member, from item `start`; a read-only view.

        Every 4 KiB touched is checked against its checksum.

        Raises:
            CorruptShardError: naming shard, key and byte.
        """
        described = self.layout.by_name[member]
        count = described.shape[0] - start if count is None else count
        row_bytes = described.data_bytes // described.shape[0]
        begin, end = start * row_bytes, (start + count) * row_bytes
        data = sample * self.layout.sample_bytes + self.layout.data_offset[member]
        stored = self._stored_checksums(sample)
        first = self.layout.first_chunk[member]
        for chunk in range(begin // CHUNK_BYTES, -(-end // CHUNK_BYTES)):
            low = chunk * CHUNK_BYTES
            high = min(low + CHUNK_BYTES, described.data_bytes)
            found = xxhash.xxh3_64_intdigest(self.view[data + low : data + high])
            if found != stored[first + chunk]:
                raise self.corrupt(data + low)
        shape = (count, *described.shape[1:])
        flat = np.frombuffer(self.view[data + begin : data + end], dtype=described.dtype)
        return flat.reshape(shape)

    def _stored_checksums(self, sample: int) -> np.ndarray:
        member = self.layout.by_name[CHECKSUMS]
        begin = sample * self.layout.sample_bytes + self.layout.data_offset[CHECKSUMS]
        return np.frombuffer(self.view[begin : begin + member.data_bytes], dtype=np.uint64)

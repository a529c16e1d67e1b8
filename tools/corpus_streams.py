"""Files as streams of bytes, unpacked in bounded memory, and lines of bounded length."""

from __future__ import annotations

import io
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from pipeline.options import UserError

_READ_BYTES = 1 << 18
# One call unpacks all it is given: 4 KiB of zstd become 128 MiB at the very most.
_PACKED_BYTES = 1 << 12
_GZIP = 16 + zlib.MAX_WBITS  # zlib: expect gzip's header and checksum
# `zstd --long=29`: what a frame may ask for is held in memory.
_MAX_WINDOW = 1 << 29
_SKIP_BYTES = 1 << 20


class Reading:
    """How far a file was read, and what of it: give one to `open_stream` and ask it at any time.

    Args:
        begin, end: the stored bytes that count; those around them may be read as well. Without an
            end, all that there are.

    Attributes:
        changed: when anything of the file was last changed, in nanoseconds, as it was opened: its
            ctime, which nobody can set back.
    """

    def __init__(self, begin: int = 0, end: int | None = None) -> None:
        import xxhash

        self.changed = 0
        self._next, self._end = begin, end
        self._digest = xxhash.xxh3_64()
        self._file: IO[bytes] | None = None

    def watch(self, file: IO[bytes]) -> None:
        """Tell the position of this file."""
        self._file = file
        self.changed = os.fstat(file.fileno()).st_ctime_ns

    def saw(self, at: int, data: memoryview) -> None:
        """Bytes from byte `at` of the file on, as they come from it; none is passed over."""
        assert at <= self._next or self._next == self._end or not data
        stop = at + len(data) if self._end is None else min(at + len(data), self._end)
        if stop > self._next:
            self._digest.update(data[self._next - at : stop - at])
            self._next = stop

    def stored_bytes(self) -> int:
        """Bytes read of the file as it is stored, buffered ones included."""
        return self._file.tell() if self._file and not self._file.closed else 0

    def digest(self) -> str:
        """Checksum (XXH3, hexadecimal) of the bytes that count, as far as they were read."""
        return self._digest.hexdigest()


class _Seen(io.FileIO):
    """A file that shows a `Reading` what is read of it."""

    reading: Reading

    def readinto(self, buffer: Any) -> int:
        at = self.tell()
        count = super().readinto(buffer)
        self.reading.saw(at, memoryview(buffer)[:count])
        return count


def _opened(path: Path, reading: Reading | None) -> IO[bytes]:
    if reading is None:
        return open(path, "rb", buffering=_READ_BYTES)
    raw = _Seen(path)
    raw.reading = reading
    file = io.BufferedReader(raw, _READ_BYTES)
    reading.watch(file)
    return file


@contextmanager
def open_stream(path: Path, reading: Reading | None = None) -> Iterator[IO[bytes]]:
    """The file's bytes, unpacked by its suffix; frames and members follow one another.

    Raises:
        UserError: the file cannot be read or unpacked to its end.
    """
    import zstandard

    try:
        with _opened(path, reading) as raw:
            if path.suffix == ".gz":
                # Python's own reader passes over flags that the format forbids.
                members = _Frames(raw, lambda: zlib.decompressobj(_GZIP), padding=b"\0")
                yield io.BufferedReader(members, _READ_BYTES)
            elif path.suffix == ".zst":
                decompressor = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW)
                yield io.BufferedReader(_Frames(raw, decompressor.decompressobj), _READ_BYTES)
            else:
                yield raw
    except (OSError, EOFError, zlib.error, zstandard.ZstdError, MemoryError) as error:
        raise UserError(
            f"input={str(path)!r}: cannot be read to its end ({error}); fetch the file again"
        ) from None


class _Frames(io.RawIOBase):
    """zstd frames or gzip members one after another; a cut one, or none, raises EOFError.

    Args:
        raw: what is packed.
        begin: makes what unpacks the next frame.
        padding: a byte of which any number may stand behind a frame.
    """

    def __init__(self, raw: IO[bytes], begin: Callable[[], Any], padding: bytes = b"") -> None:
        self._raw, self._begin, self._padding = raw, begin, padding
        self._frame: Any = None
        self._any = False
        self._packed = b""
        self._unpacked = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._unpacked:
            self._packed = self._packed or self._raw.read(_PACKED_BYTES)
            if not self._packed:
                if self._frame is not None:
                    raise EOFError("it ends inside a frame")
                if not self._any:
                    raise EOFError("it is empty, without even a frame")
                return 0
            if self._frame is None:
                if self._any and self._padding:
                    self._packed = self._packed.lstrip(self._padding)
                    if not self._packed:
                        continue
                self._frame, self._any = self._begin(), True
            self._unpacked = memoryview(self._frame.decompress(self._packed))
            self._packed = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame = None
        count = min(len(buffer), len(self._unpacked))
        buffer[:count] = self._unpacked[:count]
        self._unpacked = self._unpacked[count:]
        return count


def skip_line(stream: IO[bytes]) -> int:
    """Pass over the rest of a line, however long; its bytes, line end included."""
    skipped = 0
    while part := stream.readline(_SKIP_BYTES):
        skipped += len(part)
        if part.endswith(b"\n"):
            break
    return skipped

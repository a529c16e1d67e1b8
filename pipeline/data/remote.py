"""Shard folders behind a URL, through a local cache that the ranks of a node share.

A cached shard is named by its SHA-256 alone, so nothing that a manifest or URL says becomes part of
a local path. It is checked as it arrives and only then renamed into place. File locks keep ranks
from fetching the same shard twice; the least recently opened shards make room.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import random
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from pipeline.atomic import write_atomically
from pipeline.data.manifest import FILE_NAME, TOKENIZER_NAME, Shard
from pipeline.options import UserError

_MARKER = ".remote.json"
_TRIES = 6
_FIRST_WAIT = 0.5  # seconds before the second try; doubled for each further one
_PIECE = 8 << 20
_SMALL_FILE = 1 << 32  # bytes; a manifest or tokenizer beyond this is none
T = TypeVar("T")


def is_url(place: str | Path) -> bool:
    """Whether `place` names something elsewhere, such as s3://bucket/folder."""
    return "://" in str(place)


def local_folder(place: str, cache_dir: str, cache_gb: float) -> Path:
    """The folder in which `place` can be read: itself, or for a URL its cache.

    A cache holds the manifest and the tokenizer when this returns, and shards as they are asked
    for. Raises UserError.
    """
    if not is_url(place):
        return Path(place)
    url = place.rstrip("/")
    folder = Path(cache_dir).expanduser() / hashlib.sha256(url.encode()).hexdigest()[:24]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / "folder.lock"):
            for name in (FILE_NAME, TOKENIZER_NAME):
                content = read_small(url, name)
                if not (folder / name).exists() or (folder / name).read_bytes() != content:
                    write_atomically(folder / name, content)
            told = {"url": url, "limit_bytes": int(cache_gb * 1e9)}
            write_atomically(folder / _MARKER, json.dumps(told))
    except OSError as error:
        raise UserError(
            f"cache_dir={cache_dir!r}: {error.strerror}; give a folder that can be written"
        ) from None
    return folder


def cache_of(folder: str | Path) -> ShardCache | None:
    """The cache that `folder` is, or None for an ordinary shard folder."""
    try:
        told = json.loads((Path(folder) / _MARKER).read_bytes())
        return ShardCache(Path(folder), str(told["url"]), int(told["limit_bytes"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


class ShardCache:
    """The shards of one URL that are here.

    Attributes:
        url: of the shard folder.
        limit_bytes: what the cached shards may take together.
    """

    def __init__(self, folder: Path, url: str, limit_bytes: int) -> None:
        self.url = url
        self.limit_bytes = limit_bytes
        self._shards = folder / "shards"

    def file(self, shard: Shard) -> Path:
        """The local file of a shard, fetched and checked if it is not here.

        Raises:
            UserError: it cannot be fetched, is not what the manifest says, or does not fit.
        """
        path = self._place(shard)
        if self._used(path, shard):
            return path
        try:
            self._shards.mkdir(parents=True, exist_ok=True)
            with _locked(path.with_suffix(".lock")):
                if not self._used(path, shard):
                    arriving = path.with_suffix(".partial")
                    with _locked(self._shards / "room.lock"):
                        self._make_room(shard.bytes)
                        # What is on its way counts too.
                        with open(arriving, "wb") as file:
                            file.truncate(shard.bytes)
                    name = f"{self.url}/{shard.path}"
                    persistently(lambda: self._fetch(shard, arriving), name)
                    os.replace(arriving, path)
        except OSError as error:
            raise UserError(
                f"cache of {self.url}: {self._shards}: {error.strerror}; make room or give another "
                "cache_dir"
            ) from None
        return path

    def is_here(self, shard: Shard) -> bool:
        """Whether a shard needs no fetching; it is then marked as just used."""
        return self._used(self._place(shard), shard)

    def held_bytes(self) -> int:
        """What the shards that are here take."""
        return sum(path.stat().st_size for path in self._shards.glob("*.tar"))

    def _place(self, shard: Shard) -> Path:
        if not re.fullmatch("[0-9a-f]{64}", shard.sha256):
            raise UserError(f"shard {shard.path}: sha256={shard.sha256!r} is none; restore it")
        return self._shards / f"{shard.sha256}.tar"

    def check_sizes(self, shards: tuple[Shard, ...]) -> str | None:
        """What is wrong with the first shard that is missing or of another size there, or None."""
        sizes = list_files(self.url)
        for shard in shards:
            size = sizes.get(shard.path)
            if size != shard.bytes:
                found = "is missing" if size is None else f"has {size} bytes, not {shard.bytes}"
                return f"shard {shard.path} {found}"
        return None

    def _used(self, path: Path, shard: Shard) -> bool:
        """Whether the shard is here; marks it as just used."""
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_size == shard.bytes:
                os.utime(path)
                return True
        return False

    def _make_room(self, needed: int) -> None:
        """Remove the least recently opened shards until `needed` bytes more fit."""
        held = []
        for path in self._shards.iterdir():
            if path.suffix == ".partial" and not _is_locked(path.with_suffix(".lock")):
                # Left by a rank that was killed.
                path.unlink(missing_ok=True)
            elif path.suffix in (".tar", ".partial"):
                with contextlib.suppress(FileNotFoundError):
                    status = path.stat()
                    held.append((status.st_mtime_ns, status.st_size, path))
        total = sum(size for _, size, _ in held) + needed
        for _, size, path in sorted(held):
            if total <= self.limit_bytes:
                return
            if path.suffix == ".tar":
                path.unlink(missing_ok=True)
                total -= size
        if total > self.limit_bytes:
            raise UserError(
                f"cache_gb={self.limit_bytes / 1e9:g}: a shard of {needed / 1e9:.3f} GB does not "
                "fit beside those on their way; give more"
            )

    def _fetch(self, shard: Shard, arriving: Path) -> None:
        """Copy one shard to `arriving`; raises _Damaged where it is not what it should be."""
        digest, size = hashlib.sha256(), 0
        with open_file(self.url, shard.path) as source, open(arriving, "wb") as target:
            while piece := source.read(_PIECE):
                size += len(piece)
                if size > shard.bytes:
                    break
                digest.update(piece)
                target.write(piece)
            target.flush()
            os.fsync(target.fileno())
        if size != shard.bytes or digest.hexdigest() != shard.sha256:
            raise _Damaged(f"{size} bytes arrived that do not have the manifest's sha256")


class _Damaged(Exception):
    """What arrived is not what was stored."""


def _filesystem(url: str) -> tuple[Any, str]:
    try:
        from fsspec.core import url_to_fs

        # Listings must be new: what was missing before may be there now.
        files, root = url_to_fs(url, use_listings_cache=False)
    except ImportError as error:
        raise UserError(
            f"data={url!r}: {error}; install what reads it, for s3 with pip install "
            "'isoflop[cluster]'"
        ) from None
    except ValueError as error:
        raise UserError(f"data={url!r}: {error}; give a folder or such as s3://…") from None
    return files, root.rstrip("/")


def open_file(url: str, name: str) -> Any:
    """A file below a URL, open for reading from its beginning; `size` tells its bytes."""
    files, root = _filesystem(url)
    return files.open(f"{root}/{name}", "rb", block_size=_PIECE)


def list_files(url: str) -> dict[str, int]:
    """The files below a URL, relative to it, and their sizes. Raises UserError."""

    def listed() -> dict[str, int]:
        files, root = _filesystem(url)
        found = files.find(root, detail=True)
        return {name[len(root) :].strip("/"): item["size"] for name, item in found.items()}

    return persistently(listed, url)


def read_small(url: str, name: str) -> bytes:
    """All of a manifest or tokenizer below a URL. Raises UserError."""

    def read() -> bytes:
        with open_file(url, name) as file:
            return bytes(file.read(_SMALL_FILE))

    return persistently(read, f"{url}/{name}")


def persistently(work: Callable[[], T], what: str) -> T:
    """`work()`, tried again after what may pass: lost connections, errors of the server.

    Raises UserError when it does not pass, or at once for what is not there or not allowed.
    """
    for number in range(_TRIES):
        try:
            return work()
        except UserError:
            raise
        except FileNotFoundError:
            raise UserError(f"{what}: not there; give the URL of a finished folder") from None
        except PermissionError as error:
            raise UserError(f"{what}: not allowed ({error}); check the credentials") from None
        except Exception as error:
            # Each filesystem has exceptions of its own for a network that fails.
            reason = f"{type(error).__name__}: {error}"
        if number + 1 < _TRIES:
            # Spread, so that ranks that failed together do not come back together.
            time.sleep(_FIRST_WAIT * 2**number * random.uniform(0.5, 1.5))
    raise UserError(f"{what}: cannot be fetched in {_TRIES} tries ({reason}); try again later")


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a file lock; the kernel drops it with its process, however that ends."""
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _is_locked(path: Path) -> bool:
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False

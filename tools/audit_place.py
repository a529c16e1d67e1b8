"""Where an audited folder is: on this machine, or behind a URL, from which it is streamed."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TypeVar

from pipeline.data.manifest import FILE_NAME, TOKENIZER_NAME
from pipeline.data.remote import is_url, list_files, open_file, persistently, read_small
from pipeline.options import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Place:
    """A shard folder to read.

    Attributes:
        near: a folder of this machine that holds manifest and tokenizer: itself, or copies of them.
        url: what it is a copy of, or None.
    """

    near: Path
    url: str | None = None

    def names(self, tops: list[str]) -> list[str]:
        """The files below the folders `tops`, sorted, relative and with forward slashes."""
        if self.url is not None:
            found = [Path(name) for name in list_files(self.url) if name.partition("/")[0] in tops]
        else:
            paths = [path for top in tops for path in (self.near / top).rglob("*")]
            found = [path.relative_to(self.near) for path in paths if not path.is_dir()]
        return [name.as_posix() for name in sorted(found)]

    def read(self, name: str, work: Callable[[IO[bytes], int], T]) -> T:
        """What `work` makes of a file, open, and its size; begun anew when a network fails.

        Raises:
            OSError: there is no such file, or it cannot be read.
        """
        if self.url is None:
            with open(self.near / name, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
                return work(file, os.fstat(file.fileno()).st_size)
        url = self.url

        def streamed() -> T | FileNotFoundError:
            try:
                with open_file(url, name) as file:
                    return work(file, file.size)
            except FileNotFoundError as error:
                return error

        try:
            found = persistently(streamed, f"{url}/{name}")
        except UserError as error:
            raise OSError(None, str(error)) from None
        if isinstance(found, FileNotFoundError):
            raise FileNotFoundError(2, os.strerror(2))
        return found


@contextmanager
def audited_place(given: str) -> Iterator[Place]:
    """The folder or URL that the command was given.

    Raises:
        UserError: there is no manifest in it.
    """
    if not is_url(given):
        folder = Path(given)
        if not (folder / FILE_NAME).is_file():
            raise UserError(
                f"dir={given!r}: no {FILE_NAME} in it, so it is no finished shard folder; give "
                "the --output of isoflop tokenize (or isoflop flan), run to its end"
            )
        yield Place(folder)
        return
    url = given.rstrip("/")
    # Not training's cache: what may be damaged must not get there, nor push out what is used.
    with tempfile.TemporaryDirectory(prefix="isoflop-audit-") as near:
        (Path(near) / FILE_NAME).write_bytes(read_small(url, FILE_NAME))
        if TOKENIZER_NAME in list_files(url):
            (Path(near) / TOKENIZER_NAME).write_bytes(read_small(url, TOKENIZER_NAME))
        yield Place(Path(near), url)

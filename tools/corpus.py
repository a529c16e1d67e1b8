"""The files of a corpus and their subsets: RedPajama V1, its samples, SlimPajama, any JSONL.

Nothing here loads numpy or torch.
"""

from __future__ import annotations

import os
import re
import stat
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from glob import glob
from os.path import commonpath
from pathlib import Path, PurePath
from typing import Any

from pipeline.options import UserError

SUFFIXES = (".jsonl", ".jsonl.zst", ".jsonl.gz", ".json.gz", ".json.zst", ".ndjson")
_PROBE_BYTES = 1 << 16
_OF_FILE_SYSTEMS = ("lost+found",)  # root's alone, in the uppermost folder of many disks

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
        modified: when it was last written, in nanoseconds, as the file system tells.
        other_names: links to it under which it was found as well; it is read once.
    """

    path: Path
    name: str
    size: int
    modified: int
    other_names: tuple[str, ...] = ()

    @property
    def splittable(self) -> bool:
        """Whether a range of its bytes can be read alone."""
        return is_splittable(self.path)

    def probe(self) -> str:
        """Checksum of the first and last 64 KiB, hexadecimal: cheap at any size.

        Raises UserError where the file cannot be read.
        """
        import xxhash

        digest = xxhash.xxh3_64()
        try:
            with open(self.path, "rb") as file:
                digest.update(file.read(_PROBE_BYTES))
                file.seek(max(0, self.size - _PROBE_BYTES))
                digest.update(file.read(_PROBE_BYTES))
        except OSError as error:
            raise UserError(
                f"input={str(self.path)!r}: cannot be read ({error.strerror}); see to it, or give "
                "another --input"
            ) from None
        return digest.hexdigest()

    def refuse_changed(self, probe: str) -> None:
        """Raise UserError where the file is not what it was when it was found and probed."""
        try:
            status = self.path.stat()
            same = (status.st_size, status.st_mtime_ns) == (self.size, self.modified)
        except OSError:
            same = False
        if not same or self.probe() != probe:
            raise UserError(
                f"input={str(self.path)!r}: changed while it was read (it had {self.size:,} bytes, "
                f"written {self.told_time()}); start again when it is left alone, with a new "
                "--output"
            )

    def told_time(self) -> str:
        """`modified`, for a reader."""
        return datetime.fromtimestamp(self.modified // 10**9).isoformat(" ")


def find_inputs(
    patterns: Iterable[str], field: str = "input", exclude: Path | None = None
) -> list[InputFile]:
    """The files that the globs match (a folder stands for every JSONL file below it), by name.

    So does a folder that a glob matches, but for what is hidden below it, as is the way of globs.
    Files that are no JSONL by their suffix are passed over, as RedPajama's SHA256SUMS must be, and
    so is what lies in the folder `exclude` (the output). A file counts once, however many globs,
    links and hard links lead to it.

    Raises:
        UserError: a glob that matches no such file, a link to nothing, a folder that is not read,
            a pipe or the like.
    """
    found: dict[_Identity, Path] = {}
    names: defaultdict[_Identity, set[Path]] = defaultdict(set)
    identities: dict[Path, _Identity] = {}
    out = None if exclude is None else exclude.resolve()
    for pattern in patterns:
        # What is there by that very name is meant, whatever signs it holds.
        is_glob = not os.path.lexists(pattern)
        if is_glob:
            _refuse_unreadable(pattern, field)
        matches = [Path(m) for m in (glob(pattern, recursive=True) if is_glob else [pattern])]
        folders = {match for match in matches if match.is_dir()}
        for folder in folders:
            if folders.isdisjoint(folder.parents):
                matches += _below(folder, field, hidden=not is_glob)
        files: dict[_Identity, Path] = {}
        for match in sorted(set(matches)):
            if not match.name.endswith(SUFFIXES) or match.is_dir():
                continue
            identity = _identity(match, field)
            real = match.resolve()
            if out is not None and real.is_relative_to(out):
                continue
            # Under one name it is one file, even where the file system numbers it anew.
            identity = identities.setdefault(real, identity)
            # A link keeps its own name, which tells suffix and source: Hugging Face's cache
            # links to blobs that have neither.
            name = match.parent.resolve() / match.name
            names[identity].add(name)
            files.setdefault(identity, name)
        if not files:
            raise UserError(
                f"{field}={pattern!r}: matches no file ending in {', '.join(SUFFIXES[:3])}; give a "
                "glob in quotes, such as 'corpus/**/*.jsonl*'"
            )
        found = files | found
    root = Path(commonpath([path.parent for path in found.values()]))
    named = []
    for file, path in found.items():
        status = path.stat()
        name = path.relative_to(root).as_posix()
        others = tuple(str(other) for other in sorted(names[file] - {path}))
        named.append(InputFile(path, name, status.st_size, status.st_mtime_ns, others))
    return sorted(named, key=lambda file: file.name)


_Identity = tuple[int, int, int, int]


def _identity(path: Path, field: str) -> _Identity:
    """What two names of one file have in common. Raises UserError where it is none.

    Size and time are there for file systems that give different files one number.
    """
    try:
        status = path.stat()
    except FileNotFoundError:
        raise UserError(
            f"{field}={str(path)!r}: is a link to nothing; fetch its file, or remove it"
        ) from None
    except OSError as error:
        raise UserError(f"{field}={str(path)!r}: cannot be read ({error.strerror})") from None
    if not stat.S_ISREG(status.st_mode):
        raise UserError(
            f"{field}={str(path)!r}: is a pipe, socket or device; give files, or give it another "
            "name"
        )
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _refuse_unreadable(pattern: str, field: str) -> None:
    """Raise UserError for a folder that a glob would pass over because it may not be read."""
    folders = os.path.dirname(pattern)
    while glob_magic(folders):
        for folder in glob(folders, recursive=True):
            if os.path.isdir(folder):
                _may_be_read(Path(folder), field)
        folders = os.path.dirname(folders)


def _may_be_read(folder: Path, field: str) -> bool:
    """Whether a folder is for us at all. Raises UserError for one that should be and cannot."""
    if os.access(folder, os.R_OK | os.X_OK):
        return True
    if folder.name in _OF_FILE_SYSTEMS:
        return False
    raise UserError(
        f"{field}={str(folder)!r}: this folder cannot be read (Permission denied); see to it, or "
        "give globs that leave it out"
    )


def _below(
    folder: Path, field: str, hidden: bool, above: frozenset[str] = frozenset()
) -> Iterator[Path]:
    """Every file below a folder, linked folders included; one that holds itself ends there."""
    real = os.path.realpath(folder)
    if real in above or not _may_be_read(folder, field):
        return
    try:
        with os.scandir(folder) as entries:
            inside = sorted(entry.name for entry in entries if hidden or entry.name[0] != ".")
    except OSError as error:
        raise UserError(f"{field}={str(folder)!r}: cannot be read ({error.strerror})") from None
    for name in inside:
        path = folder / name
        if path.is_dir():
            yield from _below(path, field, hidden, above | {real})
        else:
            yield path


def told_once(files: Sequence[InputFile]) -> str | None:
    """A line on files that have more names than the one under which they are read."""
    again = [(file, name) for file in files for name in file.other_names]
    if not again:
        return None
    first, name = again[0]
    return (
        f"{len(again)} more {'name' if len(again) == 1 else 'names'} of files that are read once, "
        f"first {name} (the same file as {first.path})"
    )


def told_alike(files: Sequence[InputFile], probes: Sequence[str]) -> str | None:
    """A line on files that look like copies of others: their text would be there again.

    By equal sizes and probes, or by a name that another has without the suffix of its packing.
    """
    seen: dict[tuple[int, str], InputFile] = {}
    plain = {file.path: file for file in files}
    alike = []
    for file, probe in zip(files, probes, strict=True):
        other = seen.setdefault((file.size, probe), file)
        if other is file or not file.size:
            other = plain.get(file.path.with_suffix(""), file) if not file.splittable else file
        if other is not file:
            alike.append((file, other))
    if not alike:
        return None
    copy, original = alike[0]
    return (
        f"{len(alike)} input{' looks' if len(alike) == 1 else 's look'} like a copy of another, "
        f"first {copy.path} of {original.path}: leave out what repeats, or give --dedup exact"
    )


def is_splittable(path: PurePath) -> bool:
    """Whether ranges of bytes of such a file can be read alone."""
    return path.suffix not in (".zst", ".gz")


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

"""What text a Python installation holds: files of the libraries, and documents made of them.

Only the standard library and the distributions that isoflop needs at run time are read, in an order
that depends on their names and the seed alone. Modules are parsed, never imported.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from email.message import Message
from importlib import metadata
from pathlib import Path, PurePosixPath

from pipeline.options import UserError
from tools.sample_corpus.syntax import functions, parse, signature

SOURCES = ("common_crawl", "github", "wikipedia", "stackexchange", "book")
# At most this share of the text; what a source leaves unused goes to github.
_SHARES = {"common_crawl": 0.2, "wikipedia": 0.1, "stackexchange": 0.12, "book": 0.15}
# Which share of the files each use may draw from, so that none of them shares a file with another.
_USES = {"github": (0.0, 0.6), "stackexchange": (0.6, 0.8), "instructions": (0.8, 1.0)}
_SKIPPED_FOLDERS = {
    *("test", "tests", "testing", "idle_test", "__pycache__", "site-packages", "dist-packages"),
    "pydoc_data",  # the language reference is a document of its own
}
_LONG_TEXT = re.compile(
    r"(LICEN[CS]E|COPYING|NOTICE|AUTHORS|CREDITS|CHANGE|NEWS|HISTORY|README|API_CHANGES)", re.I
)
_TEXT_SUFFIXES = {"", ".txt", ".md", ".rst", ".APACHE", ".BSD", ".external"}


@dataclass(frozen=True)
class Library:
    """The standard library, or one installed distribution."""

    name: str
    version: str
    license: str
    readme: str


@dataclass(frozen=True)
class LibraryFile:
    """A file of a library: `name` is its path inside it, with forward slashes."""

    library: Library
    name: str
    path: Path

    @property
    def module(self) -> str:
        """Dotted name of a source file's module."""
        parts = PurePosixPath(self.name).with_suffix("").parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    def read(self) -> str | None:
        """The text, or None where it is no UTF-8 or not readable."""
        try:
            return self.path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            return None


@dataclass(frozen=True)
class Text:
    """A document to be: its source, title (path, topic or question) and library."""

    source: str
    title: str
    text: str
    library: Library


@dataclass(frozen=True)
class Installation:
    """The libraries and their files, sorted by name."""

    libraries: tuple[Library, ...]
    code: tuple[LibraryFile, ...]
    prose: tuple[LibraryFile, ...]

    @staticmethod
    @functools.cache
    def find() -> Installation:
        """Look around, once a process. Raises UserError when isoflop itself is not installed."""
        libraries: list[Library] = []
        files: list[LibraryFile] = []
        for library, found in [_standard_library(), *map(_distribution, _needed())]:
            libraries.append(library)
            files += sorted(found, key=lambda file: file.name)
        code = [f for f in files if f.name.endswith(".py")]
        prose = [f for f in files if _is_prose(f.name)]
        return Installation(tuple(libraries), tuple(code), tuple(prose))

    def code_for(self, use: str, seed: int) -> list[LibraryFile]:
        """Source files that `use` (github, stackexchange, instructions) may draw from, shuffled."""
        low, high = _USES[use]
        keyed = [(_hash(f"{seed}/{file.library.name}/{file.name}"), file) for file in self.code]
        chosen = [(key, file) for key, file in keyed if low <= key[0] / 2**64 < high]
        # The second half of the hash orders: the first has been used up to choose.
        return [file for key, file in sorted(chosen, key=lambda pair: pair[0][1])]


def _hash(text: str) -> tuple[int, int]:
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:8], "big"), int.from_bytes(digest[8:16], "big")


def _is_prose(name: str) -> bool:
    path = PurePosixPath(name)
    return path.suffix in _TEXT_SUFFIXES and bool(_LONG_TEXT.match(path.name))


def _skipped(path: PurePosixPath) -> bool:
    # _sysconfigdata holds the paths of the machine that built the interpreter.
    return bool(
        _SKIPPED_FOLDERS & set(path.parts)
        or ".." in path.parts
        or path.name.startswith("_sysconfigdata")
    )


def _standard_library() -> tuple[Library, list[LibraryFile]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    library = Library("python", sysconfig.get_python_version(), "Python-2.0", "")
    files = []
    for path in root.rglob("*"):
        name = PurePosixPath(path.relative_to(root).as_posix())
        if path.suffix in {".py", ".txt"} and not _skipped(name):
            files.append(LibraryFile(library, str(name), path))
    return library, files


def _needed() -> list[metadata.Distribution]:
    """The distributions in the closure of isoflop's run-time requirements, without itself."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    try:
        waiting = [(metadata.distribution("isoflop"), frozenset({""}))]
    except metadata.PackageNotFoundError:
        raise UserError(
            "isoflop: not installed in this Python, so its libraries are unknown; run make install"
        ) from None
    found: dict[str, metadata.Distribution] = {}
    seen: set[tuple[str, frozenset[str]]] = set()
    while waiting:
        distribution, extras = waiting.pop()
        name = canonicalize_name(distribution.metadata["Name"])
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        found[name] = distribution
        for line in distribution.requires or ():
            need = Requirement(line)
            marker = need.marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in extras):
                # Absent here although the marker asks for it: an optional wheel of another system.
                for installed in _installed(need.name):
                    waiting.append((installed, frozenset({"", *need.extras})))
    del found["isoflop"]
    return [found[name] for name in sorted(found)]


def _installed(name: str) -> list[metadata.Distribution]:
    try:
        return [metadata.distribution(name)]
    except metadata.PackageNotFoundError:
        return []


def _distribution(distribution: metadata.Distribution) -> tuple[Library, list[LibraryFile]]:
    about = distribution.metadata

    def told(field: str) -> str:
        return str(about[field]) if field in about else ""

    # The text of METADATA is the message's payload, or the Description field of old wheels.
    payload = about.get_payload() if isinstance(about, Message) else ""
    library = Library(
        name=about["Name"].lower(),
        version=about["Version"],
        license=(told("License-Expression") or told("License")).split("\n")[0][:40],
        readme=payload if isinstance(payload, str) and payload else told("Description"),
    )
    files = []
    for file in distribution.files or ():
        name = PurePosixPath(file.as_posix())
        if (name.suffix == ".py" or _is_prose(str(name))) and not _skipped(name):
            files.append(LibraryFile(library, str(name), Path(str(file.locate()))))
    return library, files


def gather(installation: Installation, total_bytes: int, seed: int) -> dict[str, list[Text]]:
    """Documents of every source, `total_bytes` of UTF-8 in all or a document more; no text twice.

    Raises:
        UserError: the installation holds less text than that.
    """
    texts: dict[str, list[Text]] = {}
    seen: set[str] = set()
    left = total_bytes
    makers: dict[str, Callable[[], Iterable[Text]]] = {
        "common_crawl": lambda: _readmes(installation),
        "wikipedia": lambda: _language_reference(installation),
        "book": lambda: _long_texts(installation),
        "stackexchange": lambda: _questions(installation, seed),
        "github": lambda: _library_source(installation, seed),
    }
    for source, make in makers.items():
        budget = min(left, int(_SHARES.get(source, 1.0) * total_bytes))
        chosen: list[Text] = []
        for text in make():
            if budget <= 0:
                break
            if text.text not in seen:
                seen.add(text.text)
                chosen.append(text)
                size = len(text.text.encode())
                budget, left = budget - size, left - size
        texts[source] = chosen
    if left > 0:
        raise UserError(
            f"megabytes={total_bytes / 1e6:g}: this installation holds only "
            f"{(total_bytes - left) / 1e6:.1f} MB of such text; give less"
        )
    return {source: texts[source] for source in SOURCES}


def _readmes(installation: Installation) -> Iterator[Text]:
    for library in installation.libraries:
        if len(library.readme.strip()) > 40:
            yield Text("common_crawl", library.name, library.readme.strip() + "\n", library)


def _language_reference(installation: Installation) -> Iterator[Text]:
    from pydoc_data.topics import topics

    for title in sorted(topics):
        yield Text("wikipedia", title, topics[title], installation.libraries[0])


def _long_texts(installation: Installation) -> Iterator[Text]:
    for file in installation.prose:
        text = file.read()
        if text and len(text) > 400:
            yield Text("book", file.name, text, file.library)


def _library_source(installation: Installation, seed: int) -> Iterator[Text]:
    for file in installation.code_for("github", seed):
        text = file.read()
        if text and _passes_quality_filter(text):
            yield Text("github", file.name, text, file.library)


def _passes_quality_filter(text: str) -> bool:
    """RedPajama's own filter for GitHub: line lengths and the share of letters and digits."""
    lines = text.splitlines()
    longest = max(map(len, lines), default=0)
    alphanumeric = sum(map(str.isalnum, text)) / len(text)
    return longest <= 1000 and len(text) / max(1, len(lines)) <= 100 and alphanumeric >= 0.25


def _questions(installation: Installation, seed: int) -> Iterator[Text]:
    for file in installation.code_for("stackexchange", seed):
        tree = parse(file.read() or "")
        for name, node in functions(tree) if tree else ():
            docstring = ast.get_docstring(node)
            if docstring and len(docstring) > 80:
                title = f"How is {file.module}.{name} used?"
                question = (
                    f"{title}\n\nI came upon this in {file.library.name} "
                    f"{file.library.version}:\n\n    {signature(node)}\n\n"
                    "What does it do, and what should I pass to it?"
                )
                yield Text("stackexchange", title, f"Q: {question}\n\nA: {docstring}", file.library)

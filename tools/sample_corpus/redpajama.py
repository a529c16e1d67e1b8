"""Documents to files that look like RedPajama V1's, its defects included.

Names of folders and files, keys of rows and the `\\uXXXX` escapes follow the published files;
values that only a crawl could give (classifier scores, time stamps) are stand-ins.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tools.sample_corpus.gather import Text

_DUMPS = ("2019-30", "2020-05", "2021-04", "2022-05", "2023-06")
_GITHUB_FILES = 4
_SYMLINK_EVERY = 97  # rows between two that carry symlink_target
_EMPTY_ROWS = 2  # in github and in book each
_CUT_SURROGATES = 2  # documents that end inside a surrogate pair


def write_corpus(
    folder: Path, texts: dict[str, list[Text]], seed: int
) -> dict[str, dict[str, int]]:
    """Write every source below `folder`; files, rows and bytes of each come back."""
    report: dict[str, dict[str, int]] = {}
    for source, write in _WRITERS.items():
        files = write(texts[source], seed)
        for name, rows in files.items():
            _write_rows(folder / source / name, rows)
        _write_sums(folder / source, list(files))
        report[source] = {
            "files": len(files),
            "rows": sum(map(len, files.values())),
            "text_bytes": sum(
                len(row["text"].encode("utf-8", "surrogatepass"))
                for rows in files.values()
                for row in rows
            ),
        }
    return report


def _write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Escapes for all that is not ASCII, as RedPajama's own writer left them.
    content = "".join(json.dumps(row) + "\n" for row in rows).encode("ascii")
    if path.suffix == ".zst":
        import zstandard

        # Two frames: a reader that stops after the first loses half of the file.
        half = content.find(b"\n", len(content) // 2) + 1
        compressor = zstandard.ZstdCompressor()
        content = compressor.compress(content[:half]) + compressor.compress(content[half:])
    path.write_bytes(content)


def _write_sums(folder: Path, names: Sequence[str]) -> None:
    lines = [
        f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in names
    ]
    (folder / "SHA256SUMS").write_text("".join(lines))


def _fraction(*parts: object) -> float:
    """A number in [0, 1) that depends on `parts` alone."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _common_crawl(texts: list[Text], seed: int) -> dict[str, list[dict[str, Any]]]:
    files: dict[str, list[dict[str, Any]]] = {}
    cut = 0
    for number, text in enumerate(texts):
        part = "head" if _fraction(seed, text.title, "part") < 0.5 else "middle"
        dump = _DUMPS[number % len(_DUMPS)]
        body = text.text
        if cut < _CUT_SURROGATES and (shortened := _cut_in_surrogate_pair(body)):
            body, cut = shortened, cut + 1
        score = round(0.25 + 0.75 * _fraction(seed, text.title), 6)
        row = {
            "text": body,
            "pred_label": "__label__wiki",
            "pred_label_prob": score,
            "wiki_prob": score,
            "source": f"cc/{dump}/en_{part}_0000.json.gz/line{number}",
        }
        name = f"{dump}/en_{part}_0000.json.gz.dedup.classifier.jsonl.zst"
        files.setdefault(name, []).append(row)
    return dict(sorted(files.items()))


def _cut_in_surrogate_pair(text: str) -> str | None:
    """`text` up to the first half of its last character beyond U+FFFF, as UTF-16 tools cut it."""
    for position in range(len(text) - 1, -1, -1):
        if ord(text[position]) > 0xFFFF:
            return text[:position] + chr(0xD800 + ((ord(text[position]) - 0x10000) >> 10))
    return None


def _github(texts: list[Text], seed: int) -> dict[str, list[dict[str, Any]]]:
    names = [
        f"filtered_{hashlib.md5(f'{seed}/{i}'.encode()).hexdigest()}.sampled.jsonl"
        for i in range(_GITHUB_FILES)
    ]
    files: dict[str, list[dict[str, Any]]] = {name: [] for name in sorted(names)}
    for number, text in enumerate(texts):
        files[names[number % _GITHUB_FILES]].append(_github_row(text, number))
    for number in range(_EMPTY_ROWS if texts else 0):
        empty = Text("github", texts[number].title, "", texts[number].library)
        files[names[number]].insert(1, _github_row(empty, number + 1))
    return files


def _github_row(text: Text, number: int) -> dict[str, Any]:
    lines = text.text.splitlines() or [""]
    size = len(text.text)
    meta: dict[str, Any] = {
        "content_hash": hashlib.md5(text.text.encode()).hexdigest(),
        "timestamp": "",
        "source": "github",
        "line_count": len(lines),
        "max_line_length": max(map(len, lines)),
        "avg_line_length": round(size / len(lines), 2),
        "alnum_prop": round(sum(map(str.isalnum, text.text)) / max(1, size), 6),
        "repo_name": f"{text.library.name}/{text.library.name}",
        "id": hashlib.sha1(text.text.encode()).hexdigest(),
        "size": str(len(text.text.encode())),
        "binary": False,
        "copies": "1",
        "ref": f"refs/tags/{text.library.version}",
        "path": text.title,
        "mode": "33188",
        "license": text.library.license,
        "language": [{"name": "Python", "bytes": str(size)}],
    }
    if number % _SYMLINK_EVERY == 0:
        meta["symlink_target"] = ""
    return {"text": text.text, "meta": meta}


def _wikipedia(texts: list[Text], seed: int) -> dict[str, list[dict[str, Any]]]:
    rows = [
        {
            "text": text.text,
            "meta": {
                "title": text.title,
                "url": f"https://docs.python.org/3/search.html?q={text.title}",
                "language": "en",
                "timestamp": "20230320",
            },
        }
        for text in texts
    ]
    return {"wiki.jsonl": rows}


def _stackexchange(texts: list[Text], seed: int) -> dict[str, list[dict[str, Any]]]:
    rows = [
        {
            "text": text.text,
            "meta": {
                "language": "en",
                "url": f"https://pypi.org/project/{text.library.name}/",
                "timestamp": "2023-03-29",
                "source": "stackexchange",
                "question_score": str(int(20 * _fraction(seed, text.title))),
            },
        }
        for text in texts
    ]
    return {"stackexchange.jsonl": rows}


def _book(texts: list[Text], seed: int) -> dict[str, list[dict[str, Any]]]:
    rows: list[dict[str, Any]] = [
        {"text": text.text, "meta": {"short_book_title": text.title, "publication_date": 2023}}
        for text in texts
    ]
    rows[1:1] = [{"text": "", "meta": {}} for _ in range(_EMPTY_ROWS)]
    return {"book.jsonl": rows}


_Writer = Callable[[list[Text], int], dict[str, list[dict[str, Any]]]]
_WRITERS: dict[str, _Writer] = {
    "common_crawl": _common_crawl,
    "github": _github,
    "wikipedia": _wikipedia,
    "stackexchange": _stackexchange,
    "book": _book,
}

"""Real text to tokenise and train on: the standard library's own source, so nothing is fetched."""

from __future__ import annotations

import json
import sysconfig
from pathlib import Path

from tools.cli import dispatch

# SentencePiece writes a space as this character: a plain loop over it loses the difference.
_SPACE_SYMBOL = "\u2581"


def make_corpus(folder: Path, max_bytes: int) -> Path:
    """`folder/corpus.jsonl`: rows of up to `max_bytes` UTF-8 bytes of text, in path order."""
    path = folder / "corpus.jsonl"
    if path.exists():
        return path
    library = Path(sysconfig.get_path("stdlib"))
    rows, size = [], 0
    for file in sorted(library.rglob("*.py")):
        if "site-packages" in file.parts or "dist-packages" in file.parts:
            continue
        text = file.read_bytes().decode("utf-8", "replace")
        if not text.strip() or _SPACE_SYMBOL in text:
            continue
        rows.append(json.dumps({"text": text}) + "\n")
        size += len(text.encode())
        if size >= max_bytes:
            break
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(rows), encoding="utf-8")
    return path


def text_megabytes(corpus: Path) -> float:
    """10⁶ UTF-8 bytes of text in a corpus."""
    with open(corpus, encoding="utf-8") as rows:
        return sum(len(json.loads(row)["text"].encode()) for row in rows) / 1e6


def make_tokenizer(folder: Path, corpus: Path, vocab_size: int, megabytes: float = 4) -> Path:
    """`folder/tokenizer.model`, learned from the corpus by `isoflop tokenizer train`."""
    path = folder / "tokenizer.model"
    flags = {"input": corpus, "output": path, "vocab_size": vocab_size, "max_megabytes": megabytes}
    dispatch(["tokenizer", "train", *(f"--{name}={value}" for name, value in flags.items())])
    return path

"""Documents that share a run of n words with an evaluation text, by hashes of n-grams.

Words are runs of letters, digits and underscores, in lower case; what stands between them does not
count. A text of fewer than n words has no n-gram and excludes nothing.
"""

from __future__ import annotations

import codecs
import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from pipeline.atomic import write_atomically
from pipeline.options import UserError
from tools.corpus import InputFile
from tools.corpus_rows import Reject, read_rows

NGRAM_WORDS = 13
_WORD = re.compile(r"\w+")
_NO_WORD = re.compile(r"\W")
_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no word's part of the sum is lost
_FILTER_BITS = 24
_KNOWN_WORDS = 1 << 18
_KNOWN_LETTERS = 64
_PIECE_BYTES = 1 << 20


class _WordHashes(dict[str, int]):
    """XXH3 of words, kept for the frequent ones."""

    def __missing__(self, word: str) -> int:
        if len(self) >= _KNOWN_WORDS:
            self.clear()
        found = xxhash.xxh3_64_intdigest(word.encode("utf-8", "surrogatepass"))
        if len(word) <= _KNOWN_LETTERS:
            self[word] = found
        return found


_hashes = _WordHashes()


def ngrams(text: str, words: int = NGRAM_WORDS) -> np.ndarray:
    """Hashes of all runs of so many words, uint64 [max(0, number of words - words + 1)].

    The hash of words w₀ … is Σᵢ xxh3(wᵢ) · baseⁿ⁻¹⁻ⁱ modulo 2⁶⁴.
    """
    return _runs(_hashes_of(text.lower()), words)


def _hashes_of(lowered: str) -> np.ndarray:
    found = _WORD.findall(lowered)
    return np.fromiter(map(_hashes.__getitem__, found), np.uint64, len(found))


def _runs(hashes: np.ndarray, words: int) -> np.ndarray:
    count = len(hashes) - words + 1
    if count <= 0:
        return np.zeros(0, np.uint64)
    total = hashes[:count].copy()
    for place in range(1, words):
        total *= _BASE
        total += hashes[place : place + count]
    return total


def ngrams_in_pieces(
    data: bytes, words: int = NGRAM_WORDS, piece_bytes: int = _PIECE_BYTES
) -> Iterator[np.ndarray]:
    """What `ngrams` finds in a text, given in UTF-8, piece by piece: memory is that of a piece."""
    before = np.zeros(0, np.uint64)
    for hashes in _hashes_in_pieces(data, piece_bytes):
        before = np.concatenate([before, hashes])
        yield _runs(before, words)
        before = before[max(0, len(before) - words + 1) :]


def _hashes_in_pieces(data: bytes, piece_bytes: int) -> Iterator[np.ndarray]:
    """Hashes of a text's words, in order."""
    rest = ""  # the begin of a word
    begun: xxhash.xxh3_64 | None = None  # of one that is longer than a piece
    for piece in _lowered_pieces(data, piece_bytes):
        if begun is not None:
            end = _NO_WORD.search(piece)
            begun.update(piece[: end.start() if end else None].encode())
            if end is None:
                continue
            yield np.array([begun.intdigest()], np.uint64)
            piece, begun = piece[end.start() :], None
        rest += piece
        cut = len(rest)
        while cut and not _NO_WORD.match(rest, cut - 1):
            cut -= 1
        if cut:
            yield _hashes_of(rest[:cut])
            rest = rest[cut:]
        elif rest:
            begun, rest = xxhash.xxh3_64(rest.encode()), ""
    yield _hashes_of(rest) if begun is None else np.array([begun.intdigest()], np.uint64)


def _lowered_pieces(data: bytes, piece_bytes: int) -> Iterator[str]:
    """The text in lower case. A Σ becomes ς behind a letter and before none, points passed over."""
    decode = codecs.getincrementaldecoder("utf-8")().decode
    left = " "  # stands for what was before: a letter, or none
    rest = ""
    for begin in range(0, len(data), piece_bytes):
        rest += decode(data[begin : begin + piece_bytes])
        sigma = rest.rfind("Σ")
        behind = rest[sigma + 1 :]
        if sigma >= 0 and f"aΣ{behind}".lower()[1] != f"aΣ{behind}a".lower()[1]:
            # It depends on what comes. For one before it, it is a letter itself.
            whole, rest = rest[:sigma], rest[sigma:]
            yield f"{left}{whole}a".lower()[1:-1]
        else:
            whole, rest = rest, ""
            yield f"{left}{whole}".lower()[1:]
        left = "a" if f"{left}{whole}Σ".lower()[-1] == "ς" else " "
    yield f"{left}{rest}".lower()[1:]


@dataclass(frozen=True)
class Evaluations:
    """What evaluation files hold.

    Attributes:
        hashes: of their n-grams, sorted, each once.
        texts: strings found in their rows.
        short: of these, too short for one n-gram.
    """

    hashes: np.ndarray
    texts: int
    short: int

    @property
    def fingerprint(self) -> str:
        """Of the n-grams, hexadecimal."""
        return hashlib.sha256(self.hashes.tobytes()).hexdigest()


def read_evaluations(files: Iterable[InputFile]) -> Evaluations:
    """All strings of all rows of JSONL files.

    Raises:
        UserError: a row is no JSON object, or there is no n-gram in any.
    """
    texts = short = 0
    parts: list[np.ndarray] = []
    for file in files:
        for row in read_rows(file.path):
            if isinstance(row, Reject):
                raise UserError(
                    f"decontaminate={str(file.path)!r}: {row.reason} at byte {row.offset}; give "
                    "JSONL rows"
                )
            for text in strings(row.fields):
                texts += 1
                found = ngrams(text)
                short += not len(found)
                parts.append(found)
    hashes = np.unique(np.concatenate(parts)) if parts else np.zeros(0, np.uint64)
    if not len(hashes):
        raise UserError(f"decontaminate: no text of {NGRAM_WORDS} words or more in these files")
    return Evaluations(hashes, texts, short)


def strings(value: Any) -> Iterator[str]:
    """Every string inside a JSON value, keys of objects apart."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from strings(inner)


class Contamination:
    """Tells which texts hold an n-gram of a set."""

    def __init__(self, hashes: np.ndarray) -> None:
        self._hashes = hashes
        # Most n-grams are told apart by a look into 16 MiB instead of a search.
        self._filter = np.zeros(1 << _FILTER_BITS, np.bool_)
        self._filter[hashes >> np.uint64(64 - _FILTER_BITS)] = True

    def holds(self, data: bytes) -> bool:
        """Whether the text, given in UTF-8, has such an n-gram."""
        return any(map(self._any, ngrams_in_pieces(data)))

    def _any(self, found: np.ndarray) -> bool:
        found = found[self._filter[found >> np.uint64(64 - _FILTER_BITS)]]
        if not len(found):
            return False
        places = np.minimum(np.searchsorted(self._hashes, found), len(self._hashes) - 1)
        return bool((self._hashes[places] == found).any())


def evaluations_path(output: Path) -> Path:
    """Where the n-grams lie while tasks run."""
    return output / "tasks" / "evaluations.ngrams"


def keep_evaluations(output: Path, evaluations: Evaluations) -> None:
    """Put the n-grams where tasks find them."""
    write_atomically(evaluations_path(output), evaluations.hashes.tobytes())


@lru_cache(maxsize=1)
def contamination_of(output: Path, fingerprint: str) -> Contamination:
    """What `keep_evaluations` left. Raises UserError when it is not that."""
    hashes = np.fromfile(evaluations_path(output), np.uint64)
    if Evaluations(hashes, 0, 0).fingerprint != fingerprint:
        raise UserError(
            f"output={str(output)!r}: tasks/{evaluations_path(output).name} is damaged; give the "
            "same command again"
        )
    return Contamination(hashes)

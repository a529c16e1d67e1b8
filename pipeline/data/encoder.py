"""A tokenizer's ids at gigatoken's speed, where that is shown to give sentencepiece's own.

gigatoken serves BPE models that normalise nothing, after it has encoded a set of adversarial texts
as sentencepiece does. It turns the literal text of a control piece into that piece's id, which
sentencepiece never does: what comes out with such an id is encoded again by sentencepiece. All else
goes through sentencepiece, and so does everything where gigatoken is not installed.
"""

from __future__ import annotations

import ctypes
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.data.cuts import SPACE_SYMBOL, Cuts
from pipeline.data.tokenizer import Tokenizer

if TYPE_CHECKING:
    import numpy as np

PART_CHARACTERS = 1 << 20  # longer texts are cut, where that changes nothing
UNCUT_CHARACTERS = 1 << 22  # of text with no place to cut: some 100 bytes each in sentencepiece
CACHE_BYTES = 96 << 20  # growth of gigatoken's cache of words, at which it is made anew
_CHECK_EVERY_BYTES = 1 << 20
_SPACE_SYMBOL_BYTES = SPACE_SYMBOL.encode()
_PROBE_SEED = 20260801
_PROBE_RANDOM_TEXTS = 300


class UncuttableError(ValueError):
    """A text too long to be encoded at once, with no place where it may be cut."""


class EncodersDifferError(RuntimeError):
    """gigatoken gave other ids than sentencepiece."""


@dataclass(frozen=True)
class Engine:
    """What encodes: gigatoken or sentencepiece, and why not gigatoken."""

    name: str
    reason: str = ""


class Encoder:
    """Encodes texts; build it with `encoder_of`.

    Attributes:
        tokenizer: whose ids come out.
        engine: what makes most of them.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        import numpy as np
        import psutil

        self.tokenizer = tokenizer
        model = tokenizer.describe()
        self._plain = model.identity and not model.removes_spaces
        self._cuts = Cuts(model.pieces, model.dummy_prefix)
        # Control pieces, unk and the user's own: what gigatoken finds by searching the text.
        self._suspicious = np.zeros(tokenizer.vocab_size, np.bool_)
        self._suspicious[list(model.special_ids)] = True
        self._process = psutil.Process()
        self._fast: Any = None
        self.engine = self._start_gigatoken(model.pieces)

    def _start_gigatoken(self, pieces: tuple[str, ...]) -> Engine:
        if not self._plain:
            return Engine("sentencepiece", "the model normalises text")
        try:
            import gigatoken
        except ImportError:
            return Engine("sentencepiece", "gigatoken is not installed; pip install gigatoken")
        self._load = gigatoken.Tokenizer.from_json
        try:
            first: Any = gigatoken.Tokenizer.from_sentencepiece(self.tokenizer.model)
        except ValueError as error:
            return Engine("sentencepiece", str(error))
        except Exception as error:
            # Its parser asserts what sentencepiece reads nevertheless.
            return Engine("sentencepiece", f"gigatoken: {type(error).__name__} {error}".rstrip())
        self._json = first._hf_json
        self._renew(first)
        for text in probe_texts(pieces):
            if self._encode_fast(text.encode()).tolist() != self.tokenizer.encode(text).tolist():
                self._fast = None
                return Engine("sentencepiece", f"gigatoken encodes {text[:20]!r} otherwise")
        return Engine("gigatoken")

    def _renew(self, made: Any = None) -> None:
        """Start with an empty cache."""
        self._fast = None
        if made is None and sys.platform == "linux":
            ctypes.CDLL(None).malloc_trim(0)  # else the next cache grows on top of this one
        self._fast = (made or self._load(self._json)).backend
        self._encoded_bytes = 0
        self._checked_at = _CHECK_EVERY_BYTES
        self._held = self._process.memory_info().rss

    def encode(self, data: bytes, check: bool = False) -> Iterator[np.ndarray]:
        """Ids of one text (UTF-8), in parts of about 1 Mi characters, to be joined.

        Args:
            check: encode it by sentencepiece as well.

        Raises:
            UncuttableError: there is no place in 4 Mi characters where it could be cut.
            EncodersDifferError: `check` found that.
        """
        if len(data) <= PART_CHARACTERS:
            return iter((self._encode_part(data, check),))
        text = data.decode()
        parts: Iterator[str] | None = iter((text,))
        if self._plain:
            parts = self._cuts.parts(text, PART_CHARACTERS, UNCUT_CHARACTERS)
        elif len(text) > UNCUT_CHARACTERS:
            parts = None
        if parts is None:
            raise UncuttableError(f"{len(text)} characters with no place to cut them")
        return (self._encode_part(part.encode(), check) for part in parts)

    def _encode_part(self, data: bytes, check: bool) -> np.ndarray:
        if self._fast is None:
            return self.tokenizer.encode(data.decode())
        ids = self._encode_fast(data)
        if check and ids.tolist() != self.tokenizer.encode(data.decode()).tolist():
            raise EncodersDifferError(f"{data[:60].decode(errors='replace')!r}")
        return ids

    def _encode_fast(self, data: bytes) -> np.ndarray:
        if self.tokenizer.lossless and _SPACE_SYMBOL_BYTES in data:
            return self.tokenizer.encode(data.decode())
        ids: np.ndarray = self._fast.encode(data)
        if self._suspicious[ids].any():
            ids = self.tokenizer.encode(data.decode())
        self._encoded_bytes += len(data)
        if self._encoded_bytes >= self._checked_at:
            self._checked_at += _CHECK_EVERY_BYTES
            if self._process.memory_info().rss - self._held > CACHE_BYTES:
                self._renew()
        return ids


_last: Encoder | None = None


def encoder_of(tokenizer: Tokenizer) -> Encoder:
    """The encoder of a tokenizer; a process that goes on with the same model keeps it."""
    global _last
    if _last is None or _last.tokenizer.sha256 != tokenizer.sha256:
        _last = Encoder(tokenizer)
    return _last


def probe_texts(pieces: tuple[str, ...]) -> Iterator[str]:
    """Texts on which an encoder of another make may differ: the same for the same pieces."""
    yield from ("", " ", "  ", "\n", "\0", "a", " a", "a ", "\ufeffa", "\r\n\x85\u2028\u2029\v\f")
    yield from ("e\u0301\u1100\u1161\u11a8", "\u202eabc\u202c", "\ufffd\ufffe\uffff", "\U0010ffff")
    yield from ("👩‍👩‍👧‍👦🏳️‍🌈🇩🇪", "नमस्ते", "ﷺ", "İıſﬁ", "日本語の文章", "𝔘𝔫𝔦")
    yield "\u00a0\u3000\u2003 \u200b"
    for character in " \t\n_-=#.0aA▁é日":
        for count in (2, 3, 7, 16, 33, 128, 1000):
            yield character * count
            yield f"x{character * count}y"
    yield "".join(map(chr, range(1, 0x300)))
    generator = random.Random(_PROBE_SEED)
    for _ in range(_PROBE_RANDOM_TEXTS):
        chosen = generator.choices(pieces, k=generator.randint(1, 60))
        yield "".join(chosen).replace(SPACE_SYMBOL, " ")
        # Halves of pieces, joined: what is merged here was seen in no training.
        halves = [piece[: 1 + generator.randrange(len(piece))] for piece in chosen if piece]
        yield "".join(halves).replace(SPACE_SYMBOL, " ")

"""A SentencePiece model with the special ids that training needs.

sentencepiece is imported when a model is loaded, not before: help pages stay quick.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.data.cuts import SPACE_SYMBOL
from pipeline.options import UserError

if TYPE_CHECKING:
    import numpy as np

PAD, BOS, EOD, MASK = "[PAD]", "[BOS]", "[EOD]", "[MASK]"
NUM_EXTRA_IDS = 100


def extra_id(index: int) -> str:
    """The piece of sentinel `index` (span corruption, T5)."""
    return f"<extra_id_{index}>"


@dataclass(frozen=True)
class ModelDescription:
    """What a SentencePiece model does to text.

    Attributes:
        pieces: that text can become or be searched for, bytes and control pieces not among them.
        special_ids: of control, unknown, unused and user-defined pieces.
        identity: no character becomes another one.
        removes_spaces: repeated, leading and trailing spaces are lost.
        dummy_prefix: a space is put before every text.
    """

    pieces: tuple[str, ...]
    special_ids: frozenset[int]
    identity: bool
    removes_spaces: bool
    dummy_prefix: bool


class Tokenizer:
    """Text to ids and back; build it with `load`.

    Attributes:
        path: file of the model.
        model: its content.
        sha256: of that file, hexadecimal.
        vocab_size: number of ids.
        pad, bos, eod: special ids. A foreign model without [PAD] gives its unk id, without [BOS]
            its own bos id or else its end id, without [EOD] its end-of-sentence id.
        mask: id of [MASK], or None in a foreign model.
        lossless: whether decode(encode(text)) == text for every text without lone surrogates.
    """

    def __init__(self, path: Path, model: bytes) -> None:
        import sentencepiece

        self.path, self.model = path, model
        self.sha256 = hashlib.sha256(model).hexdigest()
        try:
            self._processor: Any = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (RuntimeError, ValueError, OSError) as error:
            raise UserError(
                f"tokenizer={str(path)!r}: not a SentencePiece model ({error}); make one with "
                "isoflop tokenizer train"
            ) from None
        self.vocab_size: int = self._processor.get_piece_size()
        if not self.vocab_size:
            raise UserError(
                f"tokenizer={str(path)!r}: holds no pieces; make one with isoflop tokenizer train"
            )
        try:
            self._processor.id_to_piece(list(range(self.vocab_size)))
        except UnicodeDecodeError as error:
            # SentencePiece itself does not look.
            raise UserError(
                f"tokenizer={str(path)!r}: is damaged (a piece is no UTF-8: {error.object!r}); "
                "fetch it again, or make one with isoflop tokenizer train"
            ) from None
        self.eod = self._special(EOD, self._processor.eos_id())
        self.pad = self._special(PAD, self._processor.unk_id())
        bos = self._processor.bos_id()
        self.bos = self._special(BOS, bos if bos >= 0 else self.eod)
        mask = self._processor.piece_to_id(MASK)
        self.mask: int | None = mask if self._processor.is_control(mask) else None
        # What `isoflop tokenizer train` makes: identity normalisation and byte fallback.
        self.lossless = self.mask is not None and self._processor.id_to_piece(self.eod) == EOD
        # SentencePiece would decode the literal character as a space.
        self._space_symbol_ids = [
            self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_SYMBOL.encode()
        ]

    def _special(self, piece: str, otherwise: int) -> int:
        found = self._processor.piece_to_id(piece)
        if self._processor.is_control(found):
            return int(found)
        if otherwise < 0:
            raise UserError(
                f"tokenizer={str(self.path)!r}: has neither {piece} nor an id that could stand "
                "for it; make one with isoflop tokenizer train"
            )
        return int(otherwise)

    @property
    def special_ids(self) -> dict[str, int]:
        """Name to id, of those the model has."""
        named = {"pad": self.pad, "bos": self.bos, "eod": self.eod}
        return named if self.mask is None else {**named, "mask": self.mask}

    @property
    def extra_ids(self) -> tuple[int, ...]:
        """Ids of the sentinels <extra_id_0>, <extra_id_1>, …; empty in a model without them."""
        found = (self._processor.piece_to_id(extra_id(index)) for index in range(NUM_EXTRA_IDS))
        return tuple(i for i in found if i != self._processor.unk_id())

    def describe(self) -> ModelDescription:
        """What the model's own file says of it."""
        from sentencepiece import sentencepiece_model_pb2

        messages: Any = sentencepiece_model_pb2
        model = messages.ModelProto.FromString(self.model)
        kinds = messages.ModelProto.SentencePiece
        textual = (kinds.NORMAL, kinds.USER_DEFINED, kinds.UNUSED)
        ordinary = (kinds.NORMAL, kinds.BYTE)
        rules = model.normalizer_spec
        return ModelDescription(
            pieces=tuple(p.piece for p in model.pieces if p.type in textual),
            special_ids=frozenset(i for i, p in enumerate(model.pieces) if p.type not in ordinary),
            identity=not rules.precompiled_charsmap and rules.escape_whitespaces,
            removes_spaces=rules.remove_extra_whitespaces,
            dummy_prefix=rules.add_dummy_prefix,
        )

    def encode(self, text: str) -> np.ndarray:
        """Ids of `text`, int32 [tokens]; literal control pieces in it are ordinary text."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, int32. Texts must not hold lone surrogates (UnicodeEncodeError)."""
        encoded = self._processor.encode(list(texts), return_type="numpy", num_threads=1)
        if self.lossless:
            for index, text in enumerate(texts):
                if SPACE_SYMBOL in text:
                    encoded[index] = self._encode_with_space_symbol(text)
        return encoded

    def _encode_with_space_symbol(self, text: str) -> np.ndarray:
        import numpy as np

        symbol = np.array(self._space_symbol_ids, np.int32)
        parts: list[np.ndarray] = []
        for part in text.split(SPACE_SYMBOL):
            parts += [self._processor.encode(part, return_type="numpy"), symbol]
        return np.concatenate(parts[:-1])

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of `ids`; control ids stand for nothing, bytes that are no UTF-8 for U+FFFD."""
        return str(self._processor.decode([int(i) for i in ids]))

    def piece(self, id: int) -> str:
        """The piece that `id` stands for, as SentencePiece writes it."""
        return str(self._processor.id_to_piece(int(id)))

    def byte_lengths(self) -> np.ndarray:
        """UTF-8 bytes that each id stands for, int32 [vocab_size]; 0 for control ids and unk."""
        import numpy as np

        lengths = np.zeros(self.vocab_size, np.int32)
        for i in range(self.vocab_size):
            if self._processor.is_byte(i):
                lengths[i] = 1
            elif not (self._processor.is_control(i) or self._processor.is_unknown(i)):
                lengths[i] = len(self.piece(i).replace(SPACE_SYMBOL, " ").encode())
        return lengths


def load(path: str | Path) -> Tokenizer:
    """The tokenizer in file `path`. Raises UserError when it is absent or not usable."""
    path = Path(path)
    try:
        model = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"tokenizer={str(path)!r}: cannot be read ({error.strerror}); make one with isoflop "
            "tokenizer train"
        ) from None
    return Tokenizer(path, model)

"""What the arrays of a shard must hold: ids in range, ends of documents, padding, offsets, text."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import IO

import numpy as np

from pipeline.data.flan import flan_layout
from pipeline.data.shards import token_layout
from pipeline.data.tokenizer import Tokenizer, load
from tools.audit_shard import Expected, Result, Sample, read_shard

_DECODED_DOCUMENTS = 3  # of a decoded sample
_LONGEST_DECODED = 20_000  # ids of a document that is encoded again


def audit_shard(expected: Expected) -> Result:
    """Read one shard to its last byte and compare everything with what it must be."""
    try:
        result = expected.place.read(expected.shard.path, lambda *opened: _read(expected, *opened))
        if result.findings and expected.place.url is not None:
            # What is damaged there is so again; what a network damaged is not.
            result = expected.place.read(result.path, lambda *opened: _read(expected, *opened))
    except OSError as error:
        result = Result(expected.shard.path)
        result.add(f"cannot be read ({error.strerror})")
    return result


def _read(expected: Expected, file: IO[bytes], size: int) -> Result:
    shard = expected.shard
    result = Result(shard.path)
    content = (FlanContent if expected.kind == "flan" else TokenContent)(expected, result)
    read_shard(file, size, content.layout, shard, result, content.sample)
    if result.damaged:
        return result
    content.end()
    for name in ("tokens", "documents"):
        found, told = getattr(result, name), getattr(shard, name)
        if found != told:
            result.add(f"holds {found} {name}, the manifest says {told}")
    return result


@lru_cache(maxsize=2)
def _load_tokenizer(path: Path) -> tuple[Tokenizer, np.ndarray]:
    """The tokenizer and the UTF-8 bytes of each of its ids, once a process."""
    tokenizer = load(path)
    return tokenizer, tokenizer.byte_lengths().astype(np.int64)


def comes_back(tokenizer: Tokenizer, ids: np.ndarray) -> bool:
    """Whether the text of a whole document's ids encodes to those ids again."""
    if len(ids) > _LONGEST_DECODED or not tokenizer.lossless:
        return bool(tokenizer.decode(ids)) or not len(ids)
    return np.array_equal(tokenizer.encode(tokenizer.decode(ids)), ids)


class _Content:
    """What both kinds of shard share: the tokenizer, and which samples are decoded."""

    def __init__(self, expected: Expected, result: Result) -> None:
        self.expected, self.result = expected, result
        shard = expected.shard
        # Spread evenly, the first and the last included.
        chosen = np.linspace(0, max(0, shard.samples - 1), min(expected.decode, shard.samples))
        self.decoded = set(np.round(chosen).astype(int).tolist())
        self.tokenizer, self.lengths = None, None
        if expected.tokenizer is not None:
            self.tokenizer, lengths = _load_tokenizer(expected.tokenizer)
            if self.tokenizer.lossless:
                self.lengths = lengths
                result.text_bytes = 0

    def in_range(self, ids: np.ndarray, place: str) -> bool:
        """Whether every id is one of the vocabulary; a finding otherwise."""
        outside = ids >= self.expected.vocab_size
        if outside.any():
            at = int(outside.argmax())
            self.result.add(
                f"{place}: id {ids[at]} at {at} is outside the vocabulary of "
                f"{self.expected.vocab_size}"
            )
        return not outside.any()

    def padded(self, ids: np.ndarray, place: str) -> None:
        """A finding where padding holds anything but [PAD]."""
        assert self.tokenizer is not None
        if (ids != self.tokenizer.pad).any():
            self.result.add(f"{place}: the padding behind its end holds other ids than [PAD]")

    def decode(self, ids: np.ndarray, place: str) -> None:
        """Decode one document and encode it again."""
        assert self.tokenizer is not None
        if comes_back(self.tokenizer, ids):
            self.result.decoded += 1
        else:
            self.result.add(
                f"{place}: the text of its ids, encoded again, gives other ids; the tokenizer "
                "is not the one that made them"
            )


class TokenContent(_Content):
    """Blocks of documents, each ended by [EOD]; the last block of a source may be padded."""

    def __init__(self, expected: Expected, result: Result) -> None:
        super().__init__(expected, result)
        self.layout = token_layout(*expected.layout)
        self._last_id = -1

    def sample(self, sample: Sample) -> None:
        """Check one block."""
        shard, block = self.expected.shard, self.expected.layout[0]
        ids = sample.arrays["tokens.npy"]
        place = f"sample {sample.key}, tokens.npy"
        valid = min(block, max(0, shard.tokens - sample.number * block))
        usable = self.in_range(ids, place)
        if valid < block and sample.number < shard.samples - 1:
            self.result.add(f"{place}: the manifest's {shard.tokens} tokens end before the block")
        if self.tokenizer is None:
            # Without the tokenizer nothing says where a document ends: the manifest stands.
            self.result.tokens, self.result.documents = shard.tokens, shard.documents
            return
        text, padding = ids[:valid], ids[valid:]
        self.padded(padding, place)
        self.result.tokens += valid
        ends = np.flatnonzero(text == self.tokenizer.eod)
        self.result.documents += len(ends)
        self._last_id = int(text[-1]) if valid else self._last_id
        if not usable:
            return
        if self.lengths is not None and self.result.text_bytes is not None:
            self.result.text_bytes += int(self.lengths[text].sum())
        if sample.number in self.decoded:
            for begin, end in list(zip(ends[:-1] + 1, ends[1:], strict=True))[:_DECODED_DOCUMENTS]:
                self.decode(text[begin:end], f"{place}, ids {begin} to {end}")

    def end(self) -> None:
        """What only the whole shard can say."""
        shard, block = self.expected.shard, self.expected.layout[0]
        whole = shard.samples * block
        if shard.tokens > whole or (shard.tokens < whole and not self.expected.padded):
            self.result.add(
                f"the manifest says {shard.tokens} tokens in {shard.samples} blocks of {block}; "
                "only the last block of a source is padded"
            )
        short = shard.tokens < whole and self.tokenizer is not None
        if short and self.tokenizer is not None and self._last_id != self.tokenizer.eod:
            self.result.add("its last document does not end with [EOD]")


class FlanContent(_Content):
    """Rows of inputs and targets; offsets say where each begins, targets end with [EOD]."""

    def __init__(self, expected: Expected, result: Result) -> None:
        super().__init__(expected, result)
        self.layout = flan_layout(*expected.layout)

    def sample(self, sample: Sample) -> None:
        """Check the rows of one sample."""
        arrays, place = sample.arrays, f"sample {sample.key}"
        inputs, targets = arrays["inputs.npy"], arrays["targets.npy"]
        offsets, tasks = arrays["offsets.npy"].astype(np.int64), arrays["tasks.npy"]
        usable = [self.in_range(inputs, f"{place}, inputs.npy")]
        usable.append(self.in_range(targets, f"{place}, targets.npy"))
        steps = np.diff(offsets, axis=0)
        rows = int(np.count_nonzero(steps[:, 1]))
        room = (len(inputs), len(targets))
        broken = offsets[0].any() or (steps < 0).any() or (offsets[-1] > room).any()
        if broken or steps[rows:].any() or (steps[:rows, 1] < 1).any():
            self.result.add(f"{place}, offsets.npy: they do not rise from 0 to the end of the rows")
            return
        self.result.documents += rows
        self.result.tokens += int(offsets[-1].sum())
        if (tasks[:rows] == b"").any() or (tasks[rows:] != b"").any():
            self.result.add(f"{place}, tasks.npy: not one name for each of its {rows} rows")
        try:
            for task in tasks[:rows].tolist():
                task.decode()
        except UnicodeDecodeError:
            self.result.add(f"{place}, tasks.npy: a name is not UTF-8")
        if self.tokenizer is None or not all(usable):
            return
        self.padded(inputs[offsets[-1, 0] :], f"{place}, inputs.npy")
        self.padded(targets[offsets[-1, 1] :], f"{place}, targets.npy")
        self._targets(sample, targets, offsets[: rows + 1], inputs)

    def _targets(
        self, sample: Sample, targets: np.ndarray, offsets: np.ndarray, inputs: np.ndarray
    ) -> None:
        assert self.tokenizer is not None
        place = f"sample {sample.key}"
        text = targets[: offsets[-1, 1]]
        if not np.array_equal(np.flatnonzero(text == self.tokenizer.eod), offsets[1:, 1] - 1):
            self.result.add(f"{place}, targets.npy: not one [EOD] at the end of each row's targets")
        if self.lengths is not None and self.result.text_bytes is not None:
            self.result.text_bytes += int(self.lengths[text].sum())
        if sample.number in self.decoded:
            for row in range(min(_DECODED_DOCUMENTS, len(offsets) - 1)):
                (begin, start), (end, stop) = offsets[row], offsets[row + 1]
                # Rows that were cut may not come back: the cut may lie inside a character.
                for ids in (inputs[begin:end], targets[start : stop - 1]):
                    text_again = self.tokenizer.decode(ids)
                    if "\ufffd" not in text_again:
                        self.decode(ids, f"{place}, row {row}")

    def end(self) -> None:
        """The bytes of the targets' text are known shard by shard."""
        shard, found = self.expected.shard, self.result.text_bytes
        if found is not None and found != shard.text_bytes:
            self.result.add(
                f"its targets stand for {found} bytes, the manifest says {shard.text_bytes}"
            )

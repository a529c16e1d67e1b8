"""Rows and options that make a small corpus many tasks and shards, and what came out of it."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.data.tokenizer import load
from tests.tools import tokenising
from tools.corpus_records import Record

SMALL = {"task_bytes": 6000, "shard_bytes": 6000}


def line(text: str, **more: Any) -> bytes:
    """A row of RedPajama's nested form."""
    return json.dumps({"text": text, "meta": {}, **more}).encode() + b"\n"


def arguments(inputs: Path, model: Path, output: Path, **changes: Any) -> dict[str, Any]:
    """Options of `isoflop tokenize`."""
    return tokenising.arguments(inputs, model, output, **{**SMALL, **changes})


def run(inputs: Path, model: Path, output: Path, **changes: Any) -> Path:
    """The command in this process."""
    return tokenising.run_here(inputs, model, output, **{**SMALL, **changes})


def stored_ids(folder: Path, split: str, source: str, task: int) -> np.ndarray:
    """Ids of one task's shards."""
    blocks = []
    for path in sorted((folder / split / source).glob(f"shard-{task:06d}-*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith("tokens.npy"):
                    blocks.append(np.load(io.BytesIO(tar.extractfile(member).read())))
    return np.concatenate(blocks) if blocks else np.zeros(0, np.uint16)


def recovered(folder: Path, split: str, source: str) -> list[str]:
    """The documents of a source, from the shards and the lengths of the tails alone."""
    tokenizer = load(folder / "tokenizer.model")
    records = [Record.load(path) for path in sorted(folder.glob("tasks/0*.json"))]
    joined = stored_ids(folder, split, source, len(records))
    position = 0
    documents = []
    for record in records:
        ids = stored_ids(folder, split, source, record.id)
        for count in [n for sp, so, n in record.tails if (sp, so) == (split, source)]:
            ids = np.concatenate([ids, joined[position : position + count]])
            position += count
        ends = np.flatnonzero(ids == tokenizer.eod)
        assert len(ids) == 0 or ends[-1] == len(ids) - 1
        starts = [0, *(ends + 1)]
        documents += [tokenizer.decode(ids[a:b]) for a, b in zip(starts, ends, strict=False)]
    assert (joined[position:] == tokenizer.pad).all()
    assert len(joined) - position < 256
    return documents

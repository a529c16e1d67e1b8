"""From task records to a finished shard folder: tails joined, rejects joined, manifest last."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import shutil
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.atomic import put_into_place
from pipeline.data.manifest import (
    Input,
    Manifest,
    Shard,
    TokenizerInfo,
    shard_names,
    write_manifest,
)
from pipeline.data.shards import token_layout
from pipeline.data.tokenizer import Tokenizer
from pipeline.options import UserError
from tools.corpus_filters import CHOSEN
from tools.corpus_packer import BlockPacker
from tools.corpus_plan import Settings, Task
from tools.corpus_records import Record, read_left, record_path, rejects_path, tails_path
from tools.corpus_tasks import ids_dtype

REJECTS_FILE = "rejects.jsonl"
_TABLE_LINES = 30


def finalise(
    output: Path,
    tasks: Sequence[Task],
    settings: Settings,
    tokenizer: Tokenizer,
    inputs: Sequence[dict[str, Any]],
    max_reject_rate: float = 1.0,
) -> Manifest:
    """Join what the tasks left and write the manifest; `inputs` are name, size and probe of each.

    Every task must be done. What killed runs left behind is removed.

    Raises:
        UserError: a larger share of the rows than `max_reject_rate` was unusable.
    """
    records = [Record.load(record_path(output, task.id)) for task in tasks]
    # First: whoever is told of too many wants to see them.
    _join_rejects(output, records)
    check_rejects(output, records, max_reject_rate)
    shards = [shard for record in records for shard in record.shards]
    shards += _join_tails(output, records, settings, tokenizer)
    # Numbers may outgrow the width of a name.
    shards.sort(key=lambda shard: (shard.split, shard.source, len(shard.path), shard.path))
    _remove_strays(output, shards)
    manifest = Manifest(
        kind="tokens",
        dtype=ids_dtype(tokenizer.vocab_size),
        block_tokens=settings.block_tokens,
        tokenizer=TokenizerInfo(tokenizer.sha256, tokenizer.vocab_size, tokenizer.special_ids),
        settings=dataclasses.asdict(settings),
        shards=tuple(shards),
        inputs=_inputs(inputs, records),
    )
    write_manifest(output, manifest)
    remove_intermediate(output)
    return manifest


def check_rejects(output: Path, records: Sequence[Record], max_reject_rate: float) -> None:
    """Refuse a corpus of which too large a share is unusable.

    Raises:
        UserError: with the counts of each input and reason.
    """
    rows = sum(record.rows for record in records)
    unusable: Counter[tuple[str, str]] = Counter()
    for record in records:
        for reason, count in record.rejects.items():
            if reason not in CHOSEN:
                unusable[record.input, reason] += count
    rate = unusable.total() / max(1, rows)
    if rate <= max_reject_rate:
        return
    print(f"{'rows':>12}  reason        input", file=sys.stderr)
    for (name, reason), count in unusable.most_common(_TABLE_LINES):
        print(f"{count:>12,}  {reason:<12}  {name}", file=sys.stderr)
    if len(unusable) > _TABLE_LINES:
        print(f"{'…':>12}  {len(unusable) - _TABLE_LINES} more", file=sys.stderr)
    raise UserError(
        f"max_reject_rate={max_reject_rate}: {unusable.total():,} of {rows:,} rows ({rate:.2%}) "
        f"are unusable ({output / REJECTS_FILE} lists them); "
        "see to the input or --text_field, or give a higher rate: what is done stays"
    )


def _inputs(described: Sequence[dict[str, Any]], records: Sequence[Record]) -> tuple[Input, ...]:
    own: defaultdict[str, list[Record]] = defaultdict(list)
    for record in records:
        own[record.input].append(record)
    inputs: list[Input] = []
    for item in described:
        rejects: Counter[str] = Counter()
        for record in own[item["name"]]:
            rejects.update(record.rejects)
        inputs.append(
            Input(
                path=item["name"],
                size=item["size"],
                probe=item["probe"],
                rows=sum(record.rows for record in own[item["name"]]),
                documents=sum(record.documents for record in own[item["name"]]),
                rejects=dict(sorted(rejects.items())),
                replaced_surrogates=sum(r.replaced_surrogates for r in own[item["name"]]),
            )
        )
    return tuple(inputs)


def _join_tails(
    output: Path, records: Sequence[Record], settings: Settings, tokenizer: Tokenizer
) -> list[Shard]:
    """Tails in task order, one run of blocks per split and source, as if of one more task."""
    layout = token_layout(settings.block_tokens, ids_dtype(tokenizer.vocab_size))
    packers: dict[tuple[str, str], BlockPacker] = {}
    names = shard_names(len(records))
    for record in records:
        if not record.tails:
            continue
        content = read_left(output, record, tails_path(output, record.id))
        with np.load(io.BytesIO(content)) as stored:
            for split, source, _ in record.tails:
                packer = packers.get((split, source))
                if packer is None:
                    packer = packers[split, source] = BlockPacker(
                        output, split, source, names, layout, settings.shard_bytes
                    )
                ids, ends, text_bytes = (
                    stored[f"{split}/{source}/{name}"] for name in ("ids", "ends", "text_bytes")
                )
                begin = 0
                for end, length in zip(ends.tolist(), text_bytes.tolist(), strict=True):
                    packer.add(ids[begin:end])
                    packer.end_document(length)
                    begin = end
    for packer in packers.values():
        packer.pad(tokenizer.pad)
    return [shard for _, packer in sorted(packers.items()) for shard in packer.shards]


def _join_rejects(output: Path, records: Sequence[Record]) -> None:
    joined = output / "tasks" / f".{REJECTS_FILE}.partial"
    with open(joined, "wb") as file:
        for record in records:
            if record.rejects:
                file.write(read_left(output, record, rejects_path(output, record.id)))
        file.flush()
        os.fsync(file.fileno())
    put_into_place(joined, output / REJECTS_FILE)


def _remove_strays(output: Path, shards: Iterable[Shard]) -> None:
    """Remove partial files and shards that no record knows (of runs that were killed)."""
    known = {output / shard.path for shard in shards}
    for split in ("train", "validation"):
        for path in (output / split).glob("*/*"):
            if path not in known:
                path.unlink()


def remove_intermediate(output: Path) -> None:
    """Remove what only the finaliser needed; the records stay."""
    for path in (output / "tasks").iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.suffix != ".json":
            path.unlink()


def describe(manifest: Manifest) -> str:
    """One line on a finished folder."""
    rows = sum(item.rows for item in manifest.inputs)
    documents = sum(item.documents for item in manifest.inputs)
    parts = [
        f"{split} {sum(s.tokens for s in manifest.select(split)) / 1e6:.2f} Mtok"
        for split in manifest.splits()
    ]
    rejects: Counter[str] = Counter()
    for item in manifest.inputs:
        rejects.update(item.rejects)
    refused = json.dumps(dict(rejects)) if rejects else "none"
    tokens = ", ".join(parts) or "no tokens"
    return f"{tokens}; {documents} documents of {rows} rows, rejected: {refused}"

"""`isoflop flan`: instruction rows to shards of input and target tokens."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.options import UserError, option

if TYPE_CHECKING:
    from pipeline.data.flan import FlanWriter
    from pipeline.data.manifest import Input, Manifest
    from pipeline.data.tokenizer import Tokenizer
    from tools.corpus import InputFile
    from tools.corpus_rows import Reject

_BATCH_ROWS = 512


@dataclass(frozen=True)
class Options:
    """Turn instruction rows into shards of input and target tokens.

    Rows are JSONL with inputs, targets, task_source and task_name (Open-Orca's spelling with a
    leading underscore too). Targets end with [EOD]. Longer inputs and targets are cut at the end
    and counted; rows without input or target are rejected, counted and listed in rejects.jsonl. A
    finished DIR of the same options is left alone.
    """

    input: tuple[str, ...] = option("globs of the training rows", metavar="GLOB,…")
    output: str = option("the folder to write", metavar="DIR")
    tokenizer: str = option("a SentencePiece model", metavar="FILE")
    validation_input: tuple[str, ...] = option(
        "globs of the held-out rows; without it a share is held out by hash", (), metavar="GLOB,…"
    )
    validation_fraction: float = option("that share", 0.01, minimum=0)
    max_input: int = option("input ids kept of a row", 2048, minimum=1)
    max_target: int = option("target ids kept of a row, [EOD] included", 512, minimum=2)
    block_tokens: int = option("input ids in a sample", 65_536, minimum=512)
    shard_bytes: int = option("size at which a shard is full", 1 << 30, minimum=1)

    def problems(self) -> Iterator[str]:
        """What single fields cannot say."""
        smallest = max(self.max_input, 4 * self.max_target)
        if self.block_tokens < smallest or self.block_tokens % 512:
            need = -(-smallest // 512) * 512
            yield (
                f"block_tokens={self.block_tokens}: must hold a longest row and divide by 512; "
                f"give {need} or more"
            )
        if not self.validation_fraction < 1:
            yield f"validation_fraction={self.validation_fraction}: give a share below 1"


def run(options: Options) -> None:
    """Read, encode, and put the folder into place whole."""
    from pipeline.atomic import make_folder, put_into_place, write_atomically
    from pipeline.data.manifest import TOKENIZER_NAME, write_manifest
    from pipeline.data.tokenizer import load
    from tools.corpus import find_inputs, told_once

    output = Path(options.output)
    tokenizer = load(options.tokenizer)
    files = {"train": find_inputs(options.input, exclude=output)}
    if again := told_once(files["train"]):
        print(f"flan: {again}", file=sys.stderr)
    if options.validation_input:
        held_out = find_inputs(options.validation_input, "validation_input", exclude=output)
        files["heldout"] = held_out
        refuse_both(files["train"], held_out)
    plan = plan_of(options, tokenizer, files)
    if check_existing(output, plan):
        print(f"flan: {output} is complete")
        return
    started = time.monotonic()
    make_folder(output.parent)
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    manifest = _Run(options, tokenizer, partial, plan).write(files)
    write_atomically(partial / TOKENIZER_NAME, tokenizer.model)
    write_manifest(partial, manifest)
    if output.is_dir():
        output.rmdir()  # empty: check_existing saw to it
    put_into_place(partial, output)
    rows = ", ".join(
        f"{split} {sum(s.documents for s in manifest.select(split))}" for split in manifest.splits()
    )
    cut = sum(item.truncated for item in manifest.inputs)
    rejects: Counter[str] = Counter()
    for item in manifest.inputs:
        rejects.update(item.rejects)
    refused = json.dumps(dict(rejects)) if rejects else "none"
    print(
        f"flan: {output}: rows {rows}; cut {cut}, rejected {refused} "
        f"({time.monotonic() - started:.1f} s)"
    )


def plan_of(
    options: Options, tokenizer: Tokenizer, files: dict[str, list[InputFile]]
) -> dict[str, Any]:
    """What the output depends on; kept in the manifest's settings."""
    names = ("validation_fraction", "max_input", "max_target", "block_tokens", "shard_bytes")
    probes = {s: [[f.name, f.size, f.probe()] for f in found] for s, found in files.items()}
    return {
        **{name: getattr(options, name) for name in names},
        "inputs": probes,
        "tokenizer": tokenizer.sha256,
    }


def refuse_both(train: list[InputFile], held_out: list[InputFile]) -> None:
    """Raise UserError for a file that is given for training and held out as well."""
    ours = {(file.path.stat().st_dev, file.path.stat().st_ino): file for file in train}
    for file in held_out:
        status = file.path.stat()
        if (other := ours.get((status.st_dev, status.st_ino))) is not None:
            raise UserError(
                f"validation_input={str(file.path)!r}: is among the training rows as well, as "
                f"{other.path}; leave it out there"
            )


def check_existing(output: Path, plan: dict[str, Any]) -> bool:
    """Whether the folder is finished by this plan. Raises UserError when it holds anything else."""
    from pipeline.data.manifest import read_manifest

    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    made = read_manifest(output).settings if output.is_dir() else {}
    for name, value in plan.items():
        if made.get(name) != value:
            raise UserError(
                f"{name}: {output} was made otherwise (another {name}); give another --output, or "
                "remove this one"
            )
    return True


@dataclass
class _Counts:
    """What one input file held."""

    rows: int = 0
    used: int = 0
    truncated: int = 0
    surrogates: int = 0
    rejects: list[Reject] = field(default_factory=list)


@dataclass(frozen=True)
class _InstructionRow:
    source: str
    task: bytes
    inputs: str
    targets: str
    surrogates: int


class _Run:
    """One run of the command, with a writer for every split and source."""

    def __init__(
        self, options: Options, tokenizer: Tokenizer, folder: Path, plan: dict[str, Any]
    ) -> None:
        from pipeline.data.flan import flan_layout
        from pipeline.data.manifest import shard_names
        from tools.corpus_tasks import ids_dtype

        self.options, self.tokenizer, self.folder, self.plan = options, tokenizer, folder, plan
        self.dtype = ids_dtype(tokenizer.vocab_size)
        self.layout = flan_layout(options.block_tokens, self.dtype)
        self.byte_lengths = tokenizer.byte_lengths()
        self.writers: dict[tuple[str, str], FlanWriter] = {}
        self.names = shard_names(0)

    def write(self, files: dict[str, list[InputFile]]) -> Manifest:
        from pipeline.data.manifest import Manifest, TokenizerInfo

        inputs: list[Input] = []
        with open(self.folder / "rejects.jsonl", "w") as rejected:
            for split, found in files.items():
                for file, (*_, probe) in zip(found, self.plan["inputs"][split], strict=True):
                    counts = self._read(file, None if len(files) == 1 else split)
                    file.refuse_changed(probe)
                    inputs.append(_input_of(f"{split}/{file.name}", file.size, probe, counts))
                    for reject in counts.rejects:
                        told = {"file": inputs[-1].path, **dataclasses.asdict(reject)}
                        rejected.write(json.dumps(told) + "\n")
            rejected.flush()
            os.fsync(rejected.fileno())
        shards = [shard for _, writer in sorted(self.writers.items()) for shard in writer.close()]
        if not shards:
            raise UserError(
                f"input={','.join(self.options.input)!r}: no row has inputs and targets; give "
                "FLAN-shaped JSONL"
            )
        tokenizer = self.tokenizer
        return Manifest(
            kind="flan",
            dtype=self.dtype,
            block_tokens=self.options.block_tokens,
            tokenizer=TokenizerInfo(tokenizer.sha256, tokenizer.vocab_size, tokenizer.special_ids),
            settings=self.plan,
            shards=tuple(shards),
            inputs=tuple(inputs),
        )

    def _read(self, file: InputFile, split: str | None) -> _Counts:
        from tools.corpus_rows import Reject, read_rows

        counts = _Counts()
        batch: list[_InstructionRow] = []
        for row in read_rows(file.path):
            counts.rows += 1
            parsed = row if isinstance(row, Reject) else parse_instruction(row.fields, row.offset)
            if isinstance(parsed, Reject):
                counts.rejects.append(parsed)
                continue
            batch.append(parsed)
            if len(batch) == _BATCH_ROWS:
                self._encode(batch, split, counts)
                batch = []
        self._encode(batch, split, counts)
        return counts

    def _encode(self, batch: list[_InstructionRow], split: str | None, counts: _Counts) -> None:
        import numpy as np

        from tools.corpus_tasks import split_of

        options = self.options
        inputs = self.tokenizer.encode_batch([row.inputs for row in batch])
        targets = self.tokenizer.encode_batch([row.targets for row in batch])
        for row, source_ids, target_ids in zip(batch, inputs, targets, strict=True):
            kept = target_ids[: options.max_target - 1]
            counts.used += 1
            counts.surrogates += row.surrogates
            cut = len(source_ids) > options.max_input or len(kept) < len(target_ids)
            counts.truncated += cut
            side = split
            if side is None:
                text = f"{row.inputs}\0{row.targets}".encode()
                drawn = split_of(text, options.validation_fraction)
                side = "heldout" if drawn == "validation" else "train"
            whole = len(kept) == len(target_ids)
            text_bytes = len(row.targets.encode()) if whole else int(self.byte_lengths[kept].sum())
            self._writer(side, row.source).add(
                source_ids[: options.max_input],
                np.append(kept, self.tokenizer.eod),
                row.task,
                text_bytes,
            )

    def _writer(self, split: str, source: str) -> FlanWriter:
        from pipeline.data.flan import FlanWriter

        writer = self.writers.get((split, source))
        if writer is None:
            sizes = {"pad": self.tokenizer.pad, "shard_bytes": self.options.shard_bytes}
            writer = FlanWriter(self.folder, split, source, self.names, self.layout, **sizes)
            self.writers[split, source] = writer
        return writer


def parse_instruction(fields: dict[str, Any], offset: int) -> _InstructionRow | Reject:
    """A FLAN row, or why it is none."""
    from pipeline.data.flan import TASK_NAME_BYTES
    from tools.corpus_rows import Reject, replace_surrogates

    def told(name: str) -> Any:
        return fields.get(name, fields.get(f"_{name}"))

    texts: list[str] = []
    surrogates = 0
    for name in ("inputs", "targets"):
        value = told(name)
        if not isinstance(value, str):
            return Reject(offset, f"no {name}")
        if not value.strip():
            return Reject(offset, f"empty {name}")
        text, replaced = replace_surrogates(value)
        texts.append(text)
        surrogates += replaced
    task = str(told("task_name") or "unnamed").encode("utf-8", "replace")
    if len(task) > TASK_NAME_BYTES:
        return Reject(offset, f"task_name over {TASK_NAME_BYTES} bytes")
    source = re.sub(r"[^A-Za-z0-9_-]", "_", str(told("task_source") or "flan"))[:64].lower()
    return _InstructionRow(source, task, texts[0], texts[1], surrogates)


def _input_of(name: str, size: int, probe: str, counts: _Counts) -> Input:
    from pipeline.data.manifest import Input

    return Input(
        path=name,
        size=size,
        probe=probe,
        rows=counts.rows,
        documents=counts.used,
        rejects=dict(sorted(Counter(r.reason for r in counts.rejects).items())),
        replaced_surrogates=counts.surrogates,
        truncated=counts.truncated,
    )

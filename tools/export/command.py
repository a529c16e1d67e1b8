"""`isoflop export`: a run's weights as one file, as transformers' Llama, or for DeepSpeed.

Reads a checkpoint's own files, in one process and without an engine, one parameter at a time: its
memory is that of the largest parameter, whatever the size of the model or the number of ranks.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipeline.options import UserError, option

if TYPE_CHECKING:
    from pipeline.checkpointing.folder import Reader


@dataclass(frozen=True)
class Options:
    """Write a checkpoint's weights into a new folder.

    safetensors: model.safetensors and config.json (the model's own fields). hf: the same as a
    transformers Llama, for a DecLLM that is one. universal: DeepSpeed's universal checkpoint with
    the moments of AdamW or of unfactored Adafactor, for ZeRO stages 1 to 3 of any number of ranks.
    """

    run: str = option("run folder", positional=True, metavar="DIR")
    output: str = option("folder to make", metavar="DIR")
    format: Literal["safetensors", "universal", "hf"] = option("what to write", "safetensors")
    dtype: Literal["fp32", "bf16"] = option("numbers of the weights; universal is fp32", "fp32")
    step: str = option(
        "checkpoint to take: newest, best (lowest held-out loss) or a step", "newest"
    )

    def problems(self) -> Iterator[str]:
        """What single fields cannot say."""
        if self.step not in ("newest", "best") and not self.step.isdecimal():
            yield f"step={self.step!r}: not a checkpoint; give newest, best or a step"
        if self.format == "universal" and self.dtype != "fp32":
            yield f"dtype={self.dtype!r}: a universal checkpoint holds fp32; leave it out"
        output = Path(self.output)
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            yield f"output={self.output!r}: is there already; give a new folder"


@dataclass(frozen=True)
class Source:
    """What is exported.

    Attributes:
        document: the run's config.json.
        reader: the open checkpoint.
        dtype: fp32 or bf16.
        tokenizer: the run's tokenizer file, if it is still where it was.
    """

    document: dict[str, Any]
    reader: Reader
    dtype: str
    tokenizer: Path | None


def run(options: Options) -> None:
    """Write the export and say what it holds."""
    from pipeline.run_folder import RunFolder

    folder = RunFolder(options.run)
    document = folder.read_config()
    writer = _writer(options.format)
    checkpoint = choose(folder, options.step)
    from pipeline.checkpointing.folder import Reader

    target = Path(options.output)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        with Reader(checkpoint) as reader:
            source = Source(document, reader, options.dtype, _tokenizer_of(document))
            partial.mkdir(parents=True)
            written = writer(source, partial)
            if source.tokenizer is not None:
                shutil.copyfile(source.tokenizer, partial / "tokenizer.model")
        if target.exists():
            target.rmdir()
        partial.rename(target)
    except OSError as error:
        raise UserError(
            f"output={options.output!r}: cannot be written ({error.strerror}); give a folder with "
            "room"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(f"{target}: {written} of {options.run} at step {reader.state['step']}")


def _writer(name: str) -> Callable[[Source, Path], str]:
    """The function that writes one format."""
    if name == "universal":
        from tools.export.universal import write
    elif name == "hf":
        from tools.export.llama import write
    else:
        from tools.export.weights import write
    return write


def choose(folder: Any, step: str) -> Path:
    """A checkpoint of the run without fault. Raises UserError.

    Of the newest, one that is damaged is named and the one before it is taken; a checkpoint that
    was asked for is refused.
    """
    import json

    from pipeline.checkpointing.folder import fault, folder_of, list_steps

    checkpoints = folder.checkpoints
    steps = list_steps(checkpoints)
    if not steps:
        raise UserError(f"run={str(folder.path)!r}: holds no checkpoint; train it first")
    if step == "best":
        file = checkpoints / "BEST.json"
        if not file.exists():
            raise UserError(f"step='best': {folder.path} scored no checkpoint; give newest")
        step = str(json.loads(file.read_text(encoding="utf-8"))["step"])
    for candidate in steps if step == "newest" else [int(step)]:
        if candidate not in steps:
            there = ", ".join(map(str, sorted(steps)))
            raise UserError(f"step={step!r}: {folder.path} has checkpoints of {there}; give one")
        path = folder_of(checkpoints, candidate)
        try:
            found = fault(path)
        except OSError as error:
            raise UserError(
                f"checkpoint={str(path)!r}: cannot be read now ({error.strerror or error}); see to "
                "the disk and give the same command"
            ) from error
        if found is None:
            return path
        print(f"checkpoint {path} is refused: {found}")
    raise UserError(f"step={step!r}: no whole checkpoint in {folder.path}; restore one")


def _tokenizer_of(document: dict[str, Any]) -> Path | None:
    """The tokenizer that the run was trained with, where its data still lie."""
    from pipeline.checkpointing.tensor_file import sha256_of

    path = Path(document["data"]["path"]) / "tokenizer.model"
    expected = document["data"]["tokenizer_sha256"]
    return path if path.exists() and sha256_of(path) == expected else None

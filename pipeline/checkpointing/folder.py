"""`checkpoints/step_N/` on disk: what makes one whole, what is wrong with one, what is in it.

A checkpoint is one tensor file a rank (safetensors: fragments of flattened parameters and optimizer
states, named KEY@START), `state.json` with what is not a tensor, and `COMPLETE.json`, the sha256 of
each file, written last under a temporary name that is then renamed. Only files that COMPLETE.json
lists are ever read, and none before its hash was found right.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from pipeline.checkpointing.names import COMPLETE
from pipeline.checkpointing.names import folder_of as folder_of
from pipeline.checkpointing.names import list_steps as list_steps
from pipeline.checkpointing.tensor_file import DTYPES, sha256_of
from pipeline.options import UserError

FORMAT = 2
STATE = "state.json"
PARTIAL, REPLACED = ".partial", ".replaced"
MASTER = "master/"
OPTIMIZER = "optimizer/"
# Damage too: a file or its folder is not there. Every other OSError may be gone the next time.
_ABSENT = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
_TORCH_DTYPES = {name: dtype for dtype, name in DTYPES.items()}


class Damaged(Exception):
    """A checkpoint is not what was written; the message says what of it."""


def part_name(rank: int) -> str:
    """The tensor file of one rank."""
    return f"rank_{rank:05d}.safetensors"


def hidden_whole(checkpoints: Path) -> list[Path]:
    """Hidden folders with a COMPLETE.json whose step has no checkpoint; what was newer first.

    A kill between the two renames by which one checkpoint takes the place of another leaves both.
    """
    found = [
        path
        for kind in (PARTIAL, REPLACED)
        for path in sorted(checkpoints.glob(f".step_*{kind}"))
        if (path / COMPLETE).exists()
    ]
    return [path for path in found if not restored_name(path).exists()]


def restored_name(hidden: Path) -> Path:
    """Where the checkpoint in a hidden folder belongs."""
    return hidden.with_name(hidden.stem.removeprefix("."))


def clear_partial(checkpoints: Path) -> None:
    """Remove what a save that did not end has left."""
    for leftover in checkpoints.glob(".step_*"):
        shutil.rmtree(leftover, ignore_errors=True)


def set_aside(path: Path) -> None:
    """Rename a damaged checkpoint, so that it does not count among those to keep.

    What was set aside before stays: whether it can be mended is not for the run to say.
    """
    aside, number = path.with_name(f"damaged_{path.name}"), 1
    while aside.exists():
        number += 1
        aside = path.with_name(f"damaged_{path.name}.{number}")
    path.rename(aside)


def listed_files(path: Path) -> dict[str, str]:
    """File name to sha256, from COMPLETE.json.

    Raises:
        Damaged: it is no such file, or of another step than the folder's, or of another format than
            state.json is.
        UserError: it is of another format, which is no damage.
        OSError: it could not be read this time.
    """
    try:
        document = json.loads((path / COMPLETE).read_text(encoding="utf-8"))
        form, step, files = document["format"], document["step"], dict(document["sha256"])
    except (*_ABSENT, ValueError, KeyError, TypeError) as error:
        raise Damaged(f"{COMPLETE} is unreadable ({error})") from error
    if form != FORMAT:
        # One bit of it may have flipped: what another version wrote says so twice.
        if _state_format(path) != form:
            raise Damaged(f"{COMPLETE} says format {form} and {STATE} does not")
        raise UserError(
            f"checkpoint={str(path)!r}: it has format {form} and this version of isoflop reads "
            f"{FORMAT}; use the version that wrote it, or move it away"
        )
    if path.name.removesuffix(PARTIAL).removesuffix(REPLACED).removeprefix(".") != f"step_{step}":
        raise Damaged(f"{COMPLETE} is that of step {step}")
    if STATE not in files or any("/" in name or name.startswith(".") for name in files):
        raise Damaged(f"{COMPLETE} does not list a checkpoint's files")
    return files


def _state_format(path: Path) -> Any:
    """The format that state.json says it has, whatever its hash; None where it says none."""
    try:
        return read_state(path).get("format")
    except (*_ABSENT, ValueError, TypeError):
        return None


def fault(path: Path) -> str | None:
    """What is wrong with the checkpoint; None where it is whole and as it was written.

    Raises:
        UserError: it is of another format.
        OSError: it could not be read this time; that is no damage.
    """
    return hash_fault(path) or cover_fault(path)


def hash_fault(path: Path, *, share: slice = slice(None)) -> str | None:
    """As `fault`, of the files' hashes; `share` picks some of them, so that ranks can divide it."""
    try:
        expected = listed_files(path)
    except Damaged as error:
        return str(error)
    for name in sorted(expected)[share]:
        try:
            if sha256_of(path / name) != expected[name]:
                return f"{name} is not as it was written"
        except _ABSENT:
            return f"{name} is missing"
    return None


def cover_fault(path: Path) -> str | None:
    """As `fault`, of what the files hold together, for files whose hashes were found right."""
    try:
        with Reader(path):
            return None
    except Damaged as error:
        return str(error)
    except (SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
        return f"its files are not a checkpoint's ({error})"


def read_state(path: Path) -> dict[str, Any]:
    """state.json of a checkpoint without fault."""
    return dict(json.loads((path / STATE).read_text(encoding="utf-8")))


@dataclass(frozen=True)
class _Piece:
    """A contiguous part of one flattened tensor, and the file that holds it."""

    file: str
    name: str
    start: int
    length: int


class Reader:
    """The tensors of a checkpoint without fault, whichever ranks wrote them.

    Use it as a context. Holds no tensor: files are mapped, and slices are read as they are asked
    for.

    Raises:
        Damaged: the files together do not hold every element once.
        OSError: a file could not be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.state = read_state(path)
        self.shapes: dict[str, tuple[int, ...]] = {
            key: tuple(entry["shape"]) for key, entry in self.state["tensors"].items()
        }
        self._dtypes = {
            key: _TORCH_DTYPES[entry["dtype"]] for key, entry in self.state["tensors"].items()
        }
        self._pieces: dict[str, list[_Piece]] = {key: [] for key in self.shapes}
        self._files: dict[str, Any] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Reader:
        try:
            for name in sorted(listed_files(self.path)):
                if name != STATE:
                    self._open(name)
            self._check_cover()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *details: object) -> None:
        self._stack.close()

    def _open(self, file: str) -> None:
        opened = self._stack.enter_context(safe_open(str(self.path / file), framework="pt"))
        self._files[file] = opened
        for name in opened.keys():  # noqa: SIM118 (not a mapping)
            key, _, start = name.rpartition("@")
            length = opened.get_slice(name).get_shape()[0]
            self._pieces.setdefault(key, []).append(_Piece(file, name, int(start), length))

    def _check_cover(self) -> None:
        for key, pieces in self._pieces.items():
            pieces.sort(key=lambda piece: piece.start)
            reached = 0
            for piece in pieces:
                if piece.start != reached:
                    break
                reached += piece.length
            if key not in self.shapes or reached != torch.Size(self.shapes[key]).numel():
                raise Damaged(f"it does not hold {key} whole")

    def keys(self, prefix: str) -> list[str]:
        """Names of the tensors that begin with `prefix`, without it, in the model's order."""
        return [key.removeprefix(prefix) for key in self.shapes if key.startswith(prefix)]

    def dtype(self, key: str) -> torch.dtype:
        """Of one tensor."""
        return self._dtypes[key]

    def read(self, key: str) -> torch.Tensor:
        """One whole tensor, in its shape."""
        shape = torch.Size(self.shapes[key])
        whole = torch.empty(shape, dtype=self._dtypes[key])
        self.fill(key, 0, whole.view(-1))
        return whole

    def fill(self, key: str, start: int, target: torch.Tensor) -> None:
        """Copy the flattened tensor's elements from `start` on into `target`, [length]."""
        end = start + target.numel()
        for piece in self._pieces[key]:
            first, last = max(start, piece.start), min(end, piece.start + piece.length)
            if first < last:
                stored = self._files[piece.file].get_slice(piece.name)
                part = stored[first - piece.start : last - piece.start]
                target[first - start : last - start].copy_(part)


def digest(path: Path) -> dict[str, str]:
    """sha256 of every whole tensor by name: the same for every way of cutting them."""
    import hashlib

    with Reader(path) as reader:
        return {
            key: hashlib.sha256(
                reader.read(key).reshape(-1).view(torch.uint8).numpy().data
            ).hexdigest()
            for key in reader.shapes
        }


def completed_document(step: int, files: Mapping[str, str]) -> str:
    """The text of COMPLETE.json."""
    document = {"format": FORMAT, "step": step, "sha256": dict(sorted(files.items()))}
    return json.dumps(document, indent=2) + "\n"


def tensor_index(entries: Iterable[tuple[str, torch.dtype, Sequence[int]]]) -> dict[str, Any]:
    """The part of state.json that says which tensors there are."""
    return {key: {"dtype": DTYPES[dtype], "shape": list(shape)} for key, dtype, shape in entries}

"""Writing checkpoints, in the way of the training or beside it.

Every rank writes and hashes its own tensor file; then the ranks tell each other the hashes, and
rank 0 writes COMPLETE.json and renames the folder. In the background this is done by a thread with
a process group of its own, from a copy of the state in CPU memory: the training never waits for the
disk, and its collectives never meet the writer's. At most one save is under way.
"""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pipeline.atomic import make_folder, sync_folder, write_atomically
from pipeline.checkpointing import folder
from pipeline.checkpointing.tensor_file import (
    TensorSpec,
    Written,
    header_bytes,
    sha256_on_disk,
    write_tensors,
)
from pipeline.distributed import World, all_agree, barrier, same_everywhere, sum_over_ranks

# Seconds that ranks wait for the slowest one's disk; no measure of whether the training is stuck.
SAVE_TIMEOUT = 6 * 3600


@dataclass(frozen=True)
class Piece:
    """This rank's part of one tensor.

    Attributes:
        key: the tensor's name.
        shape: the whole tensor's.
        start: where the part begins in the flattened tensor.
        data: the part, [length]; empty where this rank holds nothing of it.
    """

    key: str
    shape: tuple[int, ...]
    start: int
    data: torch.Tensor

    @property
    def spec(self) -> TensorSpec:
        """What the file's header says of it."""
        return TensorSpec(f"{self.key}@{self.start}", self.data.dtype, tuple(self.data.shape))


@dataclass(frozen=True)
class Outcome:
    """How a save ended; the same on every rank.

    Attributes:
        step: of the checkpoint.
        error: why it was not written; "" when it was.
        bytes: over all ranks.
        seconds: from its start to the rename.
        blocked: seconds of them that the training waited (rank 0's).
    """

    step: int
    error: str
    bytes: int = 0
    seconds: float = 0.0
    blocked: float = 0.0


class Writer:
    """Writes one checkpoint at a time. Every method is a collective, but for `join`."""

    def __init__(
        self, checkpoints: Path, world: World, *, timeout_seconds: int = SAVE_TIMEOUT
    ) -> None:
        self._checkpoints = checkpoints
        self._world = world
        self._timeout = timedelta(seconds=timeout_seconds)
        self._group = self._new_group()
        self._is_group_usable = True
        self._thread: threading.Thread | None = None
        self._outcome: Outcome | None = None
        self._blocked = 0.0

    @property
    def is_busy(self) -> bool:
        """Whether a save was begun whose outcome nobody has taken."""
        return self._thread is not None or self._outcome is not None

    def _new_group(self) -> Any:
        # Its own, also in the foreground: over the CPU, whatever the training's runs over.
        return dist.new_group(backend="gloo", timeout=self._timeout)

    def start(self, pieces: list[Piece], state: Mapping[str, Any], *, background: bool) -> None:
        """Begin to write `checkpoints/step_N` for state["step"] = N.

        `state` is what is not a tensor, the same on every rank. The pieces may be views of what the
        training changes: in the background they are copied before this returns.
        """
        if self.is_busy:
            raise RuntimeError("a checkpoint is still being written; wait for it first")
        started = time.perf_counter()
        step = int(state["step"])
        own = sum(piece.data.numel() * piece.data.dtype.itemsize for piece in pieces)
        error = self._prepare(step, own, pieces)
        if error:
            self._outcome = Outcome(step, error)
        elif background:
            copied = [replace(piece, data=_copied(piece.data)) for piece in pieces]
            # A daemon: a disk that never answers cannot keep a failed run's process for ever.
            self._thread = threading.Thread(
                target=self._write, args=(copied, state, started), name="checkpoint", daemon=True
            )
            self._thread.start()
        else:
            self._write(pieces, state, started)
        self._blocked = time.perf_counter() - started

    def poll(self) -> Outcome | None:
        """The outcome of the save under way, once every rank's part of it has ended."""
        if not self.is_busy:
            return None
        ended = torch.tensor([int(self._thread is None or not self._thread.is_alive())])
        ended = sum_over_ranks(ended.to(self._world.device))
        return self.wait() if int(ended) == self._world.size else None

    def wait(self) -> Outcome | None:
        """The outcome of the save under way, when it has ended; None where there is none."""
        started = time.perf_counter()
        if self._thread is not None:
            self._thread.join()
            self._blocked += time.perf_counter() - started
        outcome, self._thread, self._outcome = self._outcome, None, None
        if outcome is None:
            return None
        agreed: Outcome = same_everywhere(replace(outcome, blocked=self._blocked))
        if not all_agree(self._is_group_usable):
            # A time-out leaves a group that answers nobody.
            dist.destroy_process_group(self._group)
            self._group, self._is_group_usable = self._new_group(), True
        return agreed

    def join(self) -> None:
        """Let this rank's part of the save under way end; the one method that is no collective."""
        if self._thread is not None:
            self._thread.join(self._timeout.total_seconds())

    def _prepare(self, step: int, own_bytes: int, pieces: list[Piece]) -> str:
        """Make the temporary folder where there is room; otherwise say why not."""
        headers = len(header_bytes([piece.spec for piece in pieces]))
        index = 200 * len(pieces) + 65_536
        needed = torch.tensor([own_bytes + headers + index], device=self._world.device)
        total = int(sum_over_ranks(needed))
        error = ""
        if self._world.is_main:
            try:
                # What a killed save left behind, of this step or another.
                folder.clear_partial(self._checkpoints)
                make_folder(self._checkpoints)
                free = shutil.disk_usage(self._checkpoints).free
                if free < total:
                    error = f"it needs {_size(total)} and {_size(free)} are free"
                else:
                    self._temporary(step).mkdir()
            except OSError as caught:
                error = f"{caught.strerror or caught}"
        error = same_everywhere(error)
        barrier()
        return error

    def _temporary(self, step: int) -> Path:
        return self._checkpoints / f".step_{step}{folder.PARTIAL}"

    def _write(self, pieces: list[Piece], state: Mapping[str, Any], started: float) -> None:
        """Write, agree, rename; on every rank, in the thread or not. Never raises."""
        step = int(state["step"])
        try:
            error, files, total = self._write_files(pieces, state)
            if self._world.is_main:
                error = error or self._complete(step, files)
                if error:
                    shutil.rmtree(self._temporary(step), ignore_errors=True)
            verdict = [error]
            dist.broadcast_object_list(verdict, src=0, group=self._group)
            seconds = time.perf_counter() - started
            self._outcome = Outcome(step, verdict[0], total, seconds)
        except Exception as caught:
            # Another rank is gone, or something nobody thought of: the training must hear of it.
            self._is_group_usable = False
            self._outcome = Outcome(step, f"{type(caught).__name__}: {caught}")

    def _write_files(
        self, pieces: list[Piece], state: Mapping[str, Any]
    ) -> tuple[str, dict[str, str], int]:
        """This rank's files; the first error of any rank, and the hashes and bytes of all."""
        temporary, world = self._temporary(int(state["step"])), self._world
        mine: dict[str, Written] = {}
        error = ""
        try:
            held = [piece for piece in pieces if piece.data.numel()]
            name = folder.part_name(world.rank)
            specs = [piece.spec for piece in held]
            mine[name] = write_tensors(temporary / name, specs, (piece.data for piece in held))
            # Older checkpoints go because this one is whole: the disk is asked, not believed.
            if sha256_on_disk(temporary / name) != mine[name].sha256:
                error = f"rank {world.rank}: the disk gives back other bytes than were written"
            if world.is_main:
                index = folder.tensor_index((p.key, p.data.dtype, p.shape) for p in pieces)
                text = json.dumps({"format": folder.FORMAT, **state, "tensors": index}) + "\n"
                mine[folder.STATE] = _write_text(temporary / folder.STATE, text)
        except OSError as caught:
            error = f"rank {world.rank}: {caught.strerror or caught}"
        gathered: list[Any] = [None] * world.size
        dist.all_gather_object(gathered, (error, mine), group=self._group)
        written = {name: one for _, part in gathered for name, one in part.items()}
        first = next((each for each, _ in gathered if each), "")
        hashes = {name: one.sha256 for name, one in written.items()}
        return first, hashes, sum(one.bytes for one in written.values())

    def _complete(self, step: int, files: Mapping[str, str]) -> str:
        """Rank 0's last act: COMPLETE.json, and the folder's own name. What went wrong, or ""."""
        temporary, target = self._temporary(step), folder.folder_of(self._checkpoints, step)
        replaced = self._checkpoints / f".step_{step}{folder.REPLACED}"
        try:
            write_atomically(temporary / folder.COMPLETE, folder.completed_document(step, files))
            sync_folder(temporary)
            if target.exists():
                target.rename(replaced)
            temporary.rename(target)
            sync_folder(self._checkpoints)
        except OSError as caught:
            return f"{caught.strerror or caught}"
        shutil.rmtree(replaced, ignore_errors=True)
        return ""


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(tensor, device="cpu").copy_(tensor.detach())


def _write_text(path: Path, text: str) -> Written:
    """Write a small file and hash what is there."""
    write_atomically(path, text)
    return Written(folder.sha256_of(path), path.stat().st_size)


def _size(count: int) -> str:
    """A number of bytes for a reader."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:,.1f} TB"

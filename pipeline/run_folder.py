"""The run folder: config.json, one JSON object a line elsewhere, FINISHED at the end.

Lines are appended and flushed; a line torn by a kill is cut off when the run goes on. A step that
is repeated after a restart appears again with the next `attempt`, and the last attempt wins.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from pipeline import json_lines
from pipeline.atomic import make_folder, write_atomically
from pipeline.checkpointing.retention import Retention
from pipeline.options import Fault, UserError

# Open for as long as the process lives: the kernel drops a lock with its file, however it ends.
_HELD_LOCKS: list[IO[str]] = []


class RunFolder:
    """The files of one run; only rank 0 writes."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._held: deque[tuple[str, str]] = deque()
        self._has_warned = False

    @property
    def config_file(self) -> Path:
        return self.path / "config.json"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def heartbeats(self) -> Path:
        return self.path / "heartbeat"

    @property
    def finished_file(self) -> Path:
        return self.path / "FINISHED"

    @property
    def stop_file(self) -> Path:
        """Its presence asks the run, on whichever hosts it is, to save and leave."""
        return self.path / "STOP"

    @property
    def is_finished(self) -> bool:
        """Whether the run reached its last step and its last evaluation."""
        return self.finished_file.exists()

    def read_config(self) -> dict[str, Any]:
        """config.json. Raises UserError where there is none, or none of a run."""
        try:
            document = json.loads(self.config_file.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError) as error:
            raise UserError(
                f"run={str(self.path)!r}: holds no config.json; give a run folder"
            ) from error
        except (ValueError, OSError) as error:
            raise UserError(f"{self.config_file}: cannot be read ({error}); restore it") from error
        sections = ("run", "data", "model")
        if not isinstance(document, dict) or not all(
            isinstance(document.get(section), dict) for section in sections
        ):
            raise UserError(f"{self.config_file}: lacks {', '.join(sections)}; restore it")
        return document

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Write config.json whole or not at all."""
        write_atomically(self.config_file, json.dumps(config, indent=2) + "\n")

    def append(self, name: str, record: Mapping[str, Any]) -> None:
        """Add one line to the file `name`; numbers that are not finite become null.

        Raises UserError where there is no room.
        """
        self.note(name, record)
        if problem := self.write_held():
            raise UserError(problem)

    def note(self, name: str, record: Mapping[str, Any]) -> None:
        """As `append`, but where there is no room the line waits in memory for the next one.

        The first of the lines that wait is told of.
        """
        self._held.append((name, json_lines.text(record)))
        problem = self.write_held()
        if problem and not self._has_warned:
            print(f"{problem}; until then its lines wait in memory", flush=True)
        self._has_warned = bool(problem)

    def write_held(self) -> str:
        """Write the lines that wait, in their order; what is in the way, or ""."""
        while self._held:
            name, line = self._held[0]
            try:
                json_lines.add(self.path / name, line)
            except OSError as error:
                return (
                    f"{self.path / name}: cannot be written ({error.strerror}); make room there, "
                    "and the same command goes on from the last checkpoint"
                )
            self._held.popleft()
        return ""

    def cut_torn_lines(self) -> None:
        """Remove an unfinished last line from each .jsonl file."""
        for file in self.path.glob("*.jsonl"):
            content = file.read_bytes()
            if content and not content.endswith(b"\n"):
                with file.open("r+b") as handle:
                    handle.truncate(content.rfind(b"\n") + 1)

    def lines(self, name: str) -> list[dict[str, Any]]:
        """The whole lines of one of the .jsonl files; none where it is not there.

        Raises UserError where one is no JSON object, as a host that lost power may leave it.
        """
        file = self.path / name
        content = file.read_bytes() if file.exists() else b""
        whole = content.split(b"\n")[:-1]
        return [json_lines.parsed(file, number, line) for number, line in enumerate(whole, 1)]

    def completed_checkpoints(self) -> list[int]:
        """Steps whose checkpoints were completed, in that order, since the run last started over.

        They may be gone by now.
        """
        found: list[int] = []
        for line in self.lines("checkpoints.jsonl"):
            if line["event"] == "restarted":
                found = []
            elif line["event"] == "saved":
                found.append(int(line["step"]))
        return found

    def rollbacks(self) -> int:
        """How often the run went back to its newest checkpoint."""
        count = 0
        held = [json.loads(line) for name, line in self._held if name == "checkpoints.jsonl"]
        for line in [*self.lines("checkpoints.jsonl"), *held]:
            if line["event"] in ("saved", "restarted"):
                count = 0
            count += line["event"] == "rolled_back"
        return count

    def discarded_batches(self, global_batch: int) -> list[int]:
        """The batches that a policy left out for good, by the ledger."""
        lines = self.lines("ledger.jsonl")
        return [int(x["start"]) // global_batch for x in lines if x["event"] == "discarded"]

    def refuse_lost_checkpoints(self, asked: Mapping[str, Any]) -> None:
        """Raise UserError where checkpoints were or must have been completed and none is there.

        What a kill left under a hidden name counts as there: it may be whole. `asked` is what the
        run is told now, for where its config.json is lost too.
        """
        if any(any(self.checkpoints.glob(f"{dot}step_*/COMPLETE.json")) for dot in ("", ".")):
            return
        completed = self.completed_checkpoints()
        if not completed:
            self._refuse_unrecorded_checkpoints(asked)
        else:
            raise UserError(
                f"checkpoints={str(self.checkpoints)!r}: the run completed one at step "
                f"{max(completed)} and none is there; restore it, or give --restart=true to start "
                "over"
            )

    def _refuse_unrecorded_checkpoints(self, asked: Mapping[str, Any]) -> None:
        """Raise UserError where the last attempt trained as far as its first checkpoint's step.

        By whichever of the files that tell of steps is left.
        """
        made = [
            (int(line["attempt"]), int(line["step"]), name, line)
            for name in ("metrics.jsonl", "ledger.jsonl", "eval.jsonl")
            for line in self.lines(name)
            if line["step"] > 0 and line.get("event") != "discarded"
        ]
        under_way = any(self.checkpoints.glob(".step_*"))
        if not made or under_way:
            return
        attempt, reached, file, _ = max(made, key=lambda one: one[:2])
        # It started over, or wrote down that a save failed: nothing was lost.
        saves = self.lines("checkpoints.jsonl")
        if any(line["attempt"] >= attempt and line["event"] != "saved" for line in saves):
            return
        if self.config_file.exists():
            asked = self.read_config()["run"]
        retention = Retention(
            save_every=asked.get("checkpoint_every", 0),
            keep_last=1,
            keep_every=asked.get("keep_every", 0),
            log_spaced=asked.get("log_spaced_checkpoints", 0),
        )
        # One that is due in a row of skipped steps is made after it.
        applied = [
            step
            for _, step, _, line in made
            if not line.get("skipped") and line.get("event") != "skipped"
        ]
        passed = range(1, min(reached, max(applied, default=0)) + 1)
        due = next((step for step in passed if retention.is_due(step)), None)
        if due is None:
            return
        saved_at = min(step for step in applied if step >= due)
        # A run makes checkpoints/ as it starts; a kill may come between a step's line and its save.
        if reached > saved_at or not self.checkpoints.exists():
            raise UserError(
                f"checkpoints={str(self.checkpoints)!r}: {file} goes to step {reached}, a "
                f"checkpoint was due at step {due} and none is there; restore checkpoints/ and "
                "checkpoints.jsonl, or give --restart=true to start over"
            )

    def evaluation_losses(self, eval_set: str, up_to: int) -> dict[int, float]:
        """Loss on one evaluation set by step, none after step `up_to`; the last record wins.

        What was measured after the step that a run goes on from is of weights it gave up.
        """
        return {
            int(line["step"]): float(line["loss"])
            for line in self.lines("eval.jsonl")
            if line["eval_set"] == eval_set and line["loss"] is not None and line["step"] <= up_to
        }

    def last_attempt(self) -> int:
        """The highest attempt that left a record; 0 where none did."""
        found = 0
        # The ledger too: an attempt whose first batch was discarded is in no other file.
        for name in ("metrics.jsonl", "eval.jsonl", "ledger.jsonl"):
            file = self.path / name
            lines = file.read_bytes().splitlines() if file.exists() else []
            if lines:
                found = max(found, int(json_lines.parsed(file, len(lines), lines[-1])["attempt"]))
        return found

    def evaluations(self, up_to: int) -> set[tuple[int, str]]:
        """The step and the set of every evaluation, none after step `up_to`."""
        return {
            (int(line["step"]), str(line["eval_set"]))
            for line in self.lines("eval.jsonl")
            if line["step"] <= up_to
        }

    def lock(self) -> None:
        """Keep every other process from this run until this one ends, however it ends.

        Raises UserError where the folder cannot be written, Fault where another holds the lock: it
        may leave, and a file system that lost a node keeps that node's locks for a while.
        """
        try:
            make_folder(self.path)
            handle = (self.path / ".lock").open("a+", encoding="utf-8")
        except OSError as error:
            raise UserError(
                f"run_dir={str(self.path)!r}: {error.strerror}; give a folder that can be written"
            ) from error
        if not _locked(handle):
            handle.seek(0)
            raise Fault(
                f"run_dir={str(self.path)!r}: process {handle.read().strip() or '?'} is "
                "working on it; wait for it or stop it"
            )
        try:
            handle.truncate(0)
            handle.write(f"{os.getpid()} on {socket.gethostname()}\n")
            handle.flush()
        except OSError as error:
            raise UserError(
                f"run_dir={str(self.path)!r}: {error.strerror}; make room there or give another"
            ) from error
        _HELD_LOCKS.append(handle)

    def forget_stop(self) -> None:
        """Remove the stop file, if there is one."""
        # One that another host left may not show here yet: made anew it does, and can be removed.
        with contextlib.suppress(OSError):
            self.stop_file.touch()
        self.stop_file.unlink(missing_ok=True)

    def finish(self, step: int, why: str = "") -> None:
        """Mark the run as complete, after `step` steps; `why` where that is before its last."""
        text = json.dumps({"step": step, "reason": why}) + "\n" if why else ""
        write_atomically(self.finished_file, text)

    def finished_step(self, steps: int) -> int:
        """The step that a finished run of `steps` ended with."""
        text = self.finished_file.read_text(encoding="utf-8")
        return int(json.loads(text)["step"]) if text.strip() else steps


def _locked(handle: IO[str]) -> bool:
    """Take the lock; several tries, since whoever asks who holds it has it for a moment."""
    for wait in (0.1, 0.1, 0.0):
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            time.sleep(wait)
    return False

"""SIGKILL to parts of a supervised run at drawn moments."""

from __future__ import annotations

import hashlib
import random
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from pipeline.checkpointing.folder import Reader, folder_of, list_steps
from tools.supervise.processes import has_left, processes_of, ranks_of

ROOT = Path(__file__).resolve().parent.parent.parent
_PATIENCE = 120.0  # seconds for an attempt to get somewhere


@dataclass(frozen=True)
class Kill:
    """What is killed, and when.

    Attributes:
        what: a rank, one of the launcher's two processes, everything, or the supervisor too.
        when: as the ranks start, after some steps, or while a checkpoint is written.
        steps: lines of metrics that the attempt writes before.
        seconds: to wait after that moment.
    """

    what: str
    when: str
    steps: int
    seconds: float

    @classmethod
    def draw(cls, moment: random.Random) -> Kill:
        """A kill as any other."""
        what = ["rank", "rank", "launch", "deepspeed", "everything", "supervisor"]
        when = moment.choice(["start", "step", "step", "save", "save"])
        seconds = moment.uniform(0, 6 if when == "start" else 0.05)
        return cls(moment.choice(what), when, moment.randrange(1, 12), seconds)


class Supervised:
    """`isoflop supervise` over `deepspeed pipeline/pretrain.py`, given again where it is killed."""

    def __init__(
        self, asked: dict[str, Any], ranks: int, between: Callable[[Path], object]
    ) -> None:
        """`between` is done to the run's folder when all and the supervisor were killed."""
        self._between = between
        self.run = Path(asked["run_dir"])
        supervise = ["supervise", "--backoff=0", "--max_restarts=30", "--"]
        launcher = [sys.executable, str(Path(sys.executable).parent / "deepspeed"), "--quiet"]
        told = [f"--{key}={value}" for key, value in asked.items()]
        self._command = [sys.executable, "-m", "tools.cli", *supervise, *launcher]
        self._command += ["--num_gpus", str(ranks), "pipeline/pretrain.py", *told]
        self.log = self.run.with_suffix(".log")
        self._start()

    def _start(self) -> None:
        with self.log.open("ab") as log:
            self.supervisor = subprocess.Popen(
                self._command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT
            )

    def strike(self, kill: Kill, moment: random.Random) -> bool:
        """Wait for the moment and kill; False where the run finished before it came.

        Returns when nothing is left of what was struck.
        """
        if kill.when == "start":
            self._await(lambda: len(ranks_of(self.run, time.time())) > 0)
        else:
            begun = self._lines()
            self._await(lambda: self._lines() >= begun + kill.steps)
        if kill.when == "save":
            self._await(lambda: any((self.run / "checkpoints").glob(".step_*")))
        time.sleep(kill.seconds)
        attempt = processes_of(self.run)
        if (self.run / "FINISHED").exists() or not attempt:
            return False
        targets = self._targets(kill.what, attempt, moment)
        if kill.what == "supervisor":
            self.supervisor.kill()
            self.supervisor.wait()
        for process in targets:
            process.kill()
        deadline = time.monotonic() + _PATIENCE
        while not all(has_left(process) for process in attempt):
            assert time.monotonic() < deadline, f"{kill}: not all of {attempt} have left"
            time.sleep(0.01)
        if kill.what == "supervisor":
            self._between(self.run)
            self._start()
        return True

    def finish(self, seconds: float = 200) -> str:
        """Wait for the run's end; all that was said."""
        code = self.supervisor.wait(seconds)
        said = self.log.read_text(errors="replace")
        assert code == 0, said[-6000:]
        return said

    def end(self) -> None:
        """Leave nothing behind, whatever the test came to."""
        self.supervisor.kill()
        self.supervisor.wait()
        for process in processes_of(self.run):
            process.kill()

    def _targets(
        self, what: str, attempt: list[psutil.Process], moment: random.Random
    ) -> list[psutil.Process]:
        if what in ("everything", "supervisor"):
            return attempt
        if what == "rank":
            # None yet, where a launcher has started none.
            return moment.sample(ranks_of(self.run, time.time()), k=1)
        word = "deepspeed.launcher.launch" if what == "launch" else "deepspeed"
        found = [p for p in attempt if word in (Path(w).name for w in p.cmdline()[:5])]
        return found[:1]

    def _lines(self) -> int:
        file = self.run / "metrics.jsonl"
        return file.read_bytes().count(b"\n") if file.exists() else 0

    def _await(self, holds: Callable[[], bool]) -> None:
        deadline = time.monotonic() + _PATIENCE
        while not holds() and not (self.run / "FINISHED").exists():
            is_late = self.supervisor.poll() is not None or time.monotonic() > deadline
            assert not is_late, self.log.read_text(errors="replace")[-6000:]
            time.sleep(0.01)


def final_state(run: Path, step: int) -> dict[str, str]:
    """The hash of every whole parameter and optimizer state of a checkpoint, by name."""
    with Reader(folder_of(run / "checkpoints", step)) as reader:
        return {
            key: hashlib.sha256(reader.read(key).numpy().tobytes()).hexdigest()
            for key in reader.keys("")
        }


def flip_a_bit(run: Path) -> None:
    """In the middle of a tensor file of the newest checkpoint."""
    newest = list_steps(run / "checkpoints")[0]
    file = sorted(folder_of(run / "checkpoints", newest).glob("*.safetensors"))[0]
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)

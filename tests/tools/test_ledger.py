"""Ledgers of simulated runs that skip, roll back, are killed and go on: proved, or found out."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from pipeline.guards.positions import Positions
from tools.ledger import read_ledger

BATCH = 4


class Simulated:
    """The lines that a run writes, without a run."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.lines: list[dict[str, Any]] = []
        self.positions = Positions(BATCH)
        self.step, self.attempt, self.saved = 0, 1, 0

    def write(self, event: str, step: int, span: tuple[int, int]) -> None:
        line = {"step": step, "attempt": self.attempt, "event": event}
        place = {"start": span[0], "end": span[1], "hash": f"{span[0] * 7919:016x}"}
        self.lines.append({**line, **place})

    def train(self, steps: int) -> None:
        """Anything may happen between two steps."""
        skipped: list[tuple[int, tuple[int, int]]] = []
        while self.step < steps:
            span = self.positions.span(self.step)
            what = self.random.choices(
                ["applied", "skipped", "spike", "kill", "save"], [8, 3, 1, 1, 3]
            )[0]
            if what == "kill":
                self.step, self.attempt, skipped = self.saved, self.attempt + 1, []
                continue
            if what == "save":
                self.saved = self.step
                continue
            offending = [(self.step + 1, span)]
            if what == "skipped":
                skipped.append((self.step + 1, span))
                offending = skipped
            if what == "spike" or len(skipped) == 3:
                left_out = [(step, at) for step, at in offending if step > self.saved]
                for step, at in left_out:
                    self.write("discarded", step, at)
                gone = [at[0] // BATCH for _, at in left_out]
                self.positions = self.positions.without(gone)
                self.step, self.attempt, skipped = self.saved, self.attempt + 1, []
                continue
            if what == "applied":
                skipped = []
            self.step += 1
            self.write(what, self.step, span)

    def read(self, path: Path) -> Any:
        path.write_text("".join(json.dumps(line) + "\n" for line in self.lines))
        return read_ledger(path, BATCH)


@pytest.mark.parametrize("seed", range(60))
def test_what_a_run_writes_is_proved_whenever_it_is_cut(seed: int, tmp_path: Path) -> None:
    run = Simulated(seed)
    run.train(40)
    ledger = run.read(tmp_path / "ledger.jsonl")
    assert ledger.findings == []
    assert ledger.last_step == 40
    assert ledger.positions == run.positions
    # Every batch that was gone through is one step's, or was discarded.
    seen = [entry.start // BATCH for entry in ledger.steps.values()]
    assert sorted([*seen, *run.positions.discarded]) == list(range(ledger.batches))
    for cut in range(0, len(run.lines), 7):
        shorter = Simulated(seed)
        shorter.lines = run.lines[:cut]
        assert shorter.read(tmp_path / "ledger.jsonl").findings == []


def damaged(run: Simulated, at: int) -> list[list[dict[str, Any]]]:
    """Lies about the discarded line `at`."""
    line, rest = run.lines[at], [*run.lines]
    applied = [{**each, "event": "applied"} if each is line else each for each in rest]
    dropped = [each for each in rest if each is not line]
    moved = [
        {**each, "start": each["start"] + BATCH, "end": each["end"] + BATCH}
        if each is line
        else each
        for each in rest
    ]
    return [applied, dropped, moved]


def test_a_discarded_batch_that_was_trained_on_or_is_hidden_is_found(tmp_path: Path) -> None:
    tried = 0
    for seed in range(40):
        run = Simulated(seed)
        run.train(40)
        places = [i for i, line in enumerate(run.lines) if line["event"] == "discarded"]
        last = [i for i in places if run.lines[i]["start"] // BATCH in run.positions.discarded]
        for lines in damaged(run, last[-1]) if last else []:
            tried += 1
            other = Simulated(seed)
            other.lines = lines
            assert other.read(tmp_path / "ledger.jsonl").findings, (seed, last[-1])
    assert tried > 60

"""What a run's ledger says: one line a step, the last attempt wins, and what is wrong with it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.guards.positions import Positions

DISCARDED = "discarded"
EVENTS = ("applied", "skipped", DISCARDED)


@dataclass(frozen=True)
class Entry:
    """One line.

    Attributes:
        line: its number in the file, from 1.
        step: the optimizer step, from 1.
        attempt: which start of the run made it, from 1.
        event: "applied"; "skipped" (read, but its gradient was not finite or its loss a spike);
            "discarded" (read, and left out for good: a rollback passes over it, and the step is
            made again with the next batch).
        start, end: the positions of its batch in the run's order, [start, end).
        hash: of its samples.
    """

    line: int
    step: int
    attempt: int
    event: str
    start: int
    end: int
    hash: int


@dataclass
class Ledger:
    """A ledger read to its end.

    Attributes:
        steps: the entry of each step that counts: the last attempt's; none that is discarded.
        discarded: the entries whose batches no step may train on after them.
        positions: which batch each step has, all that was discarded left out.
        replaced: entries that a later attempt made again, after a restart or a rollback.
        attempts: attempts that left an entry.
        findings: what no interrupted run can have written.
        torn: whether the last line is unfinished, as a kill leaves it.
    """

    positions: Positions
    steps: dict[int, Entry] = field(default_factory=dict)
    discarded: list[Entry] = field(default_factory=list)
    replaced: list[Entry] = field(default_factory=list)
    attempts: set[int] = field(default_factory=set)
    findings: list[str] = field(default_factory=list)
    torn: bool = False

    @property
    def last_step(self) -> int:
        """The last step that counts; 0 for none."""
        return max(self.steps, default=0)

    def events(self) -> Counter[str]:
        """How many steps that count were applied, skipped and discarded."""
        counted = Counter(entry.event for entry in self.steps.values())
        counted[DISCARDED] = len(self.positions.discarded)
        return counted

    @property
    def batches(self) -> int:
        """Batches of the order that were gone through, discarded ones included."""
        last = self.positions.batch(self.last_step - 1) if self.last_step else -1
        return max(last, *self.positions.discarded, -1) + 1


def read_ledger(path: Path, global_batch: int) -> Ledger:
    """Read `path` and hold every line against those before it.

    Within an attempt steps follow one another. An attempt begins at most one step after the last;
    where it begins earlier it replaces what came from there on. Step n has the positions of the
    n-th batch that was not discarded before. A batch is discarded as the next step of its attempt,
    or as one that the attempt has skipped; then a new attempt begins. Raises OSError.
    """
    ledger = Ledger(Positions(global_batch))
    content = path.read_bytes()
    lines = content.split(b"\n")
    if lines.pop():
        ledger.torn = True
    before: Entry | None = None
    leaving: list[Entry] = []
    for number, text in enumerate(lines, 1):
        entry = _parse(number, text)
        if isinstance(entry, str):
            ledger.findings.append(f"line {number}: {entry}")
            continue
        if leaving and (entry.event != DISCARDED or entry.attempt != leaving[0].attempt):
            _leave_out(ledger, leaving)
        if entry.event == DISCARDED:
            found = _discard_findings(ledger, before, entry)
            ledger.findings += [f"line {number}: {finding}" for finding in found]
            leaving.append(entry)
            continue
        for finding in _order_findings(ledger, before, entry):
            ledger.findings.append(f"line {number}: {finding}")
        if before is None or entry.attempt != before.attempt:
            # What this attempt goes back over no longer counts.
            for step in [step for step in ledger.steps if step >= entry.step]:
                ledger.replaced.append(ledger.steps.pop(step))
        elif entry.step in ledger.steps:
            ledger.replaced.append(ledger.steps[entry.step])
        ledger.steps[entry.step] = entry
        ledger.attempts.add(entry.attempt)
        before = entry
    _leave_out(ledger, leaving)
    ledger.findings += _trained_after_all(ledger)
    return ledger


def _leave_out(ledger: Ledger, leaving: list[Entry]) -> None:
    """A rollback discards its batches at once: the steps after it are held against all of them."""
    batches = [entry.start // ledger.positions.global_batch for entry in leaving]
    ledger.positions = ledger.positions.without(batches)
    first = min((entry.step for entry in leaving), default=None)
    for step in [step for step in ledger.steps if first is not None and step >= first]:
        ledger.replaced.append(ledger.steps.pop(step))
    ledger.discarded += leaving
    leaving.clear()


def _trained_after_all(ledger: Ledger) -> Iterator[str]:
    """Steps that no longer have the batch they should, by all that was discarded after them."""
    for step, entry in sorted(ledger.steps.items()):
        latest = max((gone.line for gone in ledger.discarded), default=0)
        if entry.line < latest and entry.start != ledger.positions.span(step - 1)[0]:
            yield f"line {entry.line}: step {step}: its batch was discarded, and it was not remade"


def _discard_findings(ledger: Ledger, before: Entry | None, entry: Entry) -> Iterator[str]:
    step, attempt = entry.step, entry.attempt
    known = ledger.steps.get(step)
    again = known is not None and (known.event, known.attempt) == ("skipped", attempt)
    if again and known is not None:
        if (known.start, known.end, known.hash) != (entry.start, entry.end, entry.hash):
            yield f"step {step}: is discarded with other samples than it was skipped with"
        return
    if step < 1 or (entry.start, entry.end) != ledger.positions.span(step - 1):
        yield f"step {step}: is discarded with positions {entry.start} to {entry.end}, not its own"
    last = 0 if before is None else before.step
    if before is not None and attempt == before.attempt and step != last + 1:
        yield f"step {step}: is discarded after step {last} of the same attempt"


def _parse(number: int, text: bytes) -> Entry | str:
    """The entry of one line, or what is wrong with it."""
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError):
        return "is not JSON"
    if not isinstance(fields, dict):
        return "is no JSON object"
    for name in ("step", "attempt", "start", "end"):
        value = fields.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            return f"{name}={value!r} is not a count"
    if fields.get("event") not in EVENTS:
        return f"event={fields.get('event')!r} is none of {', '.join(EVENTS)}"
    hashed: Any = fields.get("hash")
    try:
        value = int(hashed, 16)
    except (TypeError, ValueError):
        return f"hash={hashed!r} is not a hexadecimal number"
    if len(hashed) != 16:
        return f"hash={hashed!r} has not 16 digits"
    names = ("step", "attempt", "event", "start", "end")
    return Entry(number, *(fields[name] for name in names), hash=value)


def _order_findings(ledger: Ledger, before: Entry | None, entry: Entry) -> Iterator[str]:
    step, attempt = entry.step, entry.attempt
    if step < 1:
        yield f"step {step}: steps count from 1"
    elif (entry.start, entry.end) != (span := ledger.positions.span(step - 1)):
        yield (
            f"step {step}: has the positions {entry.start} to {entry.end}; with a global batch of "
            f"{ledger.positions.global_batch} they are {span[0]} to {span[1]}"
        )
    last = before.attempt if before is not None else 0
    if attempt < last:
        yield f"step {step}: attempt {attempt} comes after attempt {last}"
    expected = ledger.last_step + 1
    if before is not None and attempt == last:
        expected = before.step + 1
        if step < expected:
            yield f"step {step}: is repeated within attempt {attempt}"
    if step > expected:
        missing = f"step {expected}" if step == expected + 1 else f"steps {expected} to {step - 1}"
        yield f"step {step}: {missing} missing before it in attempt {attempt}"

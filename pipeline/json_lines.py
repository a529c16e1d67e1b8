"""Files of one JSON object a line: what a line holds, how it is added, how it is read."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.options import UserError


def text(record: Mapping[str, Any]) -> str:
    """The line of `record`; numbers that are not finite become null."""
    return json.dumps(_finite(record), allow_nan=False) + "\n"


def parsed(file: Path, number: int, line: bytes) -> dict[str, Any]:
    """The record of line `number` of `file`. Raises UserError where it is no JSON object."""
    try:
        record = json.loads(line)
    except ValueError:
        record = None
    if not isinstance(record, dict):
        raise UserError(f"{file}: line {number} is no JSON object; remove that line")
    return record


def add(file: Path, line: str) -> None:
    """Add a line whole or not at all."""
    data = line.encode()
    with file.open("ab", buffering=0) as handle:
        before = handle.tell()
        try:
            written = 0
            while written < len(data):
                written += handle.write(data[written:])
        except OSError:
            handle.truncate(before)
            raise


def _finite(record: Mapping[str, Any]) -> dict[str, Any]:
    finite: dict[str, Any] = {}
    for key, value in record.items():
        if isinstance(value, Mapping):
            finite[key] = _finite(value)
        else:
            lost = isinstance(value, float) and not math.isfinite(value)
            finite[key] = None if lost else value
    return finite

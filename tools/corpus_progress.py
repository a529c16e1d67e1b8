"""A progress line on stderr: one that is rewritten on a terminal, a plain one now and then else."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from typing import TextIO

_PLAIN_SECONDS = 10.0


@dataclass
class Progress:
    """Shows `label: done of total megabytes, rate, time left`.

    Attributes:
        label: what is going on.
        total: bytes there are.
        skipped: bytes that an earlier run did; they count as done but not for the rate.
    """

    label: str
    total: float
    skipped: float = 0.0
    stream: TextIO = field(default_factory=lambda: sys.stderr)

    def __post_init__(self) -> None:
        self._started = self._shown = time.monotonic()
        self._width = 0

    def show(self, done: float, detail: str = "") -> None:
        """Show that `done` bytes are done; cheap to call often."""
        now = time.monotonic()
        live = self.stream.isatty()
        if now - self._shown < (0.2 if live else _PLAIN_SECONDS):
            return
        self._shown = now
        rate = (done - self.skipped) / max(now - self._started, 1e-9)
        left = f"{(self.total - done) / rate:.0f} s left" if rate > 0 else "waiting"
        line = f"{self.label}: {done / 1e6:.1f} of {self.total / 1e6:.1f} MB, "
        line += f"{rate / 1e6:.2f} MB/s, {left}{', ' + detail if detail else ''}"
        if live:
            self.stream.write("\r" + line.ljust(self._width))
            self._width = len(line)
        else:
            self.stream.write(line + "\n")
        self.stream.flush()

    def close(self) -> None:
        """Clear the line of a terminal."""
        if self._width:
            self.stream.write("\r" + " " * self._width + "\r")
            self.stream.flush()

"""The launcher above this rank: when it is gone, nobody would ever end the rank but itself.

DeepSpeed's launch.py ends its ranks when one fails; killed itself, it leaves them as orphans that
train on unseen. The same where `deepspeed`, which started launch.py, is gone.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any, TextIO

import psutil

_SHELLS = ("sh", "bash", "dash", "zsh")
_LAUNCHERS = ("deepspeed.launcher.launch", "deepspeed.launcher.runner")


def is_launcher(argv: Sequence[str]) -> bool:
    """Whether a command line is that of one of DeepSpeed's launchers."""
    if is_shell(argv):
        return False
    words = argv[:4]
    return any(word in _LAUNCHERS or PurePath(word).name in ("deepspeed", "ds") for word in words)


def is_shell(argv: Sequence[str]) -> bool:
    """Whether a command line is a shell's; a login shell's begins with a dash."""
    return bool(argv) and PurePath(argv[0].removeprefix("-")).name in _SHELLS


class Launcher:
    """The processes that started this rank, seen when it began."""

    def __init__(self) -> None:
        """Watches nothing where no launcher started this process.

        Nor where a shell did under nohup: the rank was asked to outlive it.
        """
        self._parent = os.getppid() if "RANK" in os.environ else 0
        self._above: list[psutil.Process] = []
        process = psutil.Process(self._parent) if self._parent > 1 else None
        while process is not None:
            try:
                words = process.cmdline()
                if not is_launcher(words):
                    outlives = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
                    if not self._above and is_shell(words) and outlives:
                        self._parent = 0
                    break
                self._above.append(process)
                process = process.parent()
            except psutil.Error:
                # Another user's, or just gone; the parent itself is looked at without this.
                break

    def is_gone(self) -> bool:
        """Whether the parent, or a launcher above it, has ended."""
        if self._parent and os.getppid() != self._parent:
            return True
        return any(_has_ended(process) for process in self._above)


def _has_ended(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
    except psutil.AccessDenied:
        # Another user's, on a host that hides them: the parent itself is looked at without this.
        return False


class Unheard:
    """A stream whose reader may be gone: what cannot be written is dropped.

    With the launcher or the terminal goes whoever read the run's lines. That must not keep the run
    from saving; its folder holds what matters.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """As the stream's."""
        try:
            return self._stream.write(text)
        except OSError:
            return len(text)

    def flush(self) -> None:
        """As the stream's."""
        try:
            self._stream.flush()
        except OSError:
            return

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def outlive_readers() -> None:
    """Let this process print on where nobody reads any more."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, Unheard):
            setattr(sys, name, Unheard(stream))

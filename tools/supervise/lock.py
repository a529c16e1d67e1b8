"""One supervisor a run: a lock that the kernel drops with its process, and who holds it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import psutil

from pipeline.options import UserError

_LOCK = ".supervisor"


@contextlib.contextmanager
def only_supervisor(run: Path, node: str = "") -> Iterator[None]:
    """Keep other supervisors from the run. Raises UserError where there is one.

    Args:
        node: of a run that is launched on each of its nodes by itself, and supervised there.
    """
    name = f"{_LOCK}.{node}" if node else _LOCK
    existed = run.exists()
    try:
        run.mkdir(parents=True, exist_ok=True)
        handle = (run / name).open("a+", encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"run_dir={str(run)!r}: {error.strerror}; give a folder that can be written"
        ) from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            handle.seek(0)
            raise UserError(
                f"run_dir={str(run)!r}: process {handle.read().strip() or '?'} supervises it; wait "
                "for it or stop it"
            ) from None
        handle.truncate(0)
        handle.write(f"{os.getpid()} on {socket.gethostname()}\n")
        handle.flush()
        try:
            yield
        finally:
            if not existed and all(path.name == name for path in run.iterdir()):
                shutil.rmtree(run)  # of a run that was never begun


def supervisor_here(run: Path) -> psutil.Process | None:
    """The run's supervisor, where it is on this host and lives."""
    for file in run.glob(f"{_LOCK}*"):
        with file.open(encoding="utf-8") as handle:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
                continue  # nobody's
            pid, _, host = handle.read().strip().partition(" on ")
        if host == socket.gethostname() and pid.isdecimal():
            with contextlib.suppress(psutil.NoSuchProcess):
                return psutil.Process(int(pid))
    return None

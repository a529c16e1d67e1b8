"""Files that are whole or absent: written under another name, then renamed into place.

Nothing is in place before all of it is on disk, and what is in place stays so: after a rename the
folder is synced too, as its new name may otherwise be lost with the power when a file that was
written later is not.
"""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path

# What file systems (of networks, of user space) say that cannot sync a folder, and what any says
# of a folder that may be written but not listed.
_CANNOT_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EACCES)


def partial_path(path: Path) -> Path:
    """Where this process writes what will become `path`; no other one, on no other host, does."""
    return path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.partial")


def put_into_place(partial: Path, path: Path) -> None:
    """Rename a file that is on disk already; its new name is there too when this returns."""
    os.replace(partial, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to disk, where its file system can."""
    try:
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC:
            raise


def make_folder(folder: Path) -> None:
    """Make a folder and those above it that are missing, their names on disk."""
    missing = [path for path in (folder, *folder.parents) if not path.is_dir()]
    for path in reversed(missing):
        path.mkdir(exist_ok=True)
        sync_folder(path.parent)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a whole file, folders above it included; no reader ever sees half of it.

    When that fails (a full disk), nothing is left behind.
    """
    data = content.encode() if isinstance(content, str) else content
    make_folder(path.parent)
    partial = partial_path(path)
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        put_into_place(partial, path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)
        raise

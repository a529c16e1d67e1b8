"""What would be left of a folder if the power went now.

A file's bytes are there if they were synced since they last changed; a name is there if its folder
was synced since it came. Nothing else may be counted on.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import xxhash


class PowerCut:
    """Watches what this process syncs and renames below `base`, which is there already.

    Args:
        before_rename: called with the temporary and the final path before each rename into place.
    """

    def __init__(
        self,
        base: Path,
        monkeypatch: pytest.MonkeyPatch,
        before_rename: Callable[[Path, Path], None],
    ) -> None:
        self.base = base
        self._content: dict[int, int] = {}
        self._names: dict[int, dict[str, int]] = {}
        self._before = before_rename
        self._replace = os.replace
        monkeypatch.setattr(os, "fsync", self._sync)
        monkeypatch.setattr(os, "replace", self._rename)

    def _sync(self, handle: int) -> None:
        path, inode = Path(os.readlink(f"/proc/self/fd/{handle}")), os.fstat(handle).st_ino
        if path.is_dir():
            self._names[inode] = {entry.name: entry.inode() for entry in os.scandir(path)}
        else:
            self._content[inode] = xxhash.xxh3_64_intdigest(path.read_bytes())

    def _rename(self, source: str | Path, target: str | Path) -> None:
        self._before(Path(source), Path(target))
        self._replace(source, target)

    def has_bytes(self, path: Path) -> bool:
        """Whether the bytes of a file, or of all files below a folder, are there as they are."""
        if path.is_dir():
            names = self._names.get(path.stat().st_ino, {})
            return all(entry.name in names and self.has_bytes(entry) for entry in path.iterdir())
        return self._content.get(path.stat().st_ino) == xxhash.xxh3_64_intdigest(path.read_bytes())

    def leaves(self, path: Path) -> bool:
        """Whether a file would be found under its name, whole."""
        for name in (path, *path.parents):
            if name == self.base:
                return self.has_bytes(path)
            names = self._names.get(name.parent.stat().st_ino, {})
            if names.get(name.name) != name.stat().st_ino:
                return False
        raise ValueError(f"{path} is not below {self.base}")

"""Where checkpoints lie and which of them are whole, by their names alone; imports no torch."""

from __future__ import annotations

import os
import re
from pathlib import Path

COMPLETE = "COMPLETE.json"


def folder_of(checkpoints: Path, step: int) -> Path:
    """Where the checkpoint of `step` lies."""
    return checkpoints / f"step_{step}"


def list_steps(checkpoints: Path) -> list[int]:
    """Steps that have a folder with a COMPLETE.json, newest first."""
    try:
        names = os.listdir(checkpoints)
    except FileNotFoundError:
        return []
    found = [match for match in (re.fullmatch(r"step_(\d+)", name) for name in names) if match]
    whole = [int(match[1]) for match in found if (checkpoints / match[0] / COMPLETE).exists()]
    return sorted(whole, reverse=True)


def partial_bytes(checkpoints: Path) -> int:
    """What saves that did not end have left on the disk, and the next save removes."""
    unfinished = [
        folder for folder in checkpoints.glob(".step_*") if not (folder / COMPLETE).exists()
    ]
    files = [file.lstat() for folder in unfinished for file in folder.rglob("*")]
    return sum(512 * file.st_blocks for file in files)

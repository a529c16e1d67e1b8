"""How a process ends: one line and an exit code."""

from __future__ import annotations

import errno
import os

import pytest

from pipeline import atomic, program
from pipeline.options import Fault, UserError


def ended(
    error: BaseException,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    rank: int = 3,
) -> tuple[int, str]:
    """Exit code and stderr of a program, one rank of a launch, that ends with `error`."""
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setattr(program, "OTHER_RANKS_WAIT", 0)

    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as found:
        program.run_as_program(main)
    return int(str(found.value.code)), capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("size='x': wrong;\n  give y"), 2, "rank 3: error: size='x': wrong; give y\n"),
        (Fault("rank 1 is gone", told_by=3), 1, "rank 3: error: rank 1 is gone\n"),
        (
            OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/runs/a/config.json"),
            2,
            "rank 3: error: /runs/a/config.json: cannot be written (No space left on device); make "
            "room there\n",
        ),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_what_is_known_is_one_line(
    error: BaseException,
    code: int,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert ended(error, monkeypatch, capsys) == (code, line)


def test_an_interrupted_launch_says_so_once(monkeypatch, capsys) -> None:
    said = "interrupted; the same command goes on from here\n"
    assert ended(KeyboardInterrupt(), monkeypatch, capsys, rank=0) == (130, said)


def test_what_nobody_thought_of_keeps_its_traceback() -> None:
    def main() -> None:
        raise OSError(errno.EACCES, "no", "/x")

    with pytest.raises(OSError, match="/x"):
        program.run_as_program(main)


def test_a_write_that_fails_names_its_file(tmp_path, monkeypatch) -> None:
    def full(number: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(atomic.os, "fsync", full)
    with pytest.raises(OSError, match=r"config\.json"):
        atomic.write_atomically(tmp_path / "config.json", "{}")
    assert list(tmp_path.iterdir()) == []

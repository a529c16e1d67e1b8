"""`isoflop stop` on a host that has none of the run's ranks."""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from pathlib import Path

import pytest

from pipeline.guards.heartbeat import Beat, Heart, beat_file, read_beats
from tools import stop
from tools.cli import dispatch


def beat(run: Path, age: float = 0.0, phase: str = "data") -> None:
    """Rank 0, on another host, says where it was `age` seconds ago."""
    (run / "heartbeat").mkdir(parents=True, exist_ok=True)
    told = {"host": "n1", "launch": "1", "phase": phase, "time": time.time() - age}
    said = dataclasses.replace(Heart().current(), **told)
    beat_file(run / "heartbeat", 0).write_text(json.dumps(dataclasses.asdict(said)))


def leave_when_asked(run: Path) -> None:
    """As rank 0 does."""
    deadline = time.monotonic() + 30
    while not (run / "STOP").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    (run / "STOP").unlink()
    beat(run, phase="ended")


def test_ranks_elsewhere_are_asked_by_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    beat(tmp_path)
    rank = threading.Thread(target=leave_when_asked, args=(tmp_path,))
    rank.start()
    dispatch(["stop", str(tmp_path)])
    rank.join()
    assert "asks 1 rank(s) on n1" in capsys.readouterr().out
    assert not (tmp_path / "STOP").exists()


def test_what_does_not_leave_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    beat(tmp_path)
    with pytest.raises(SystemExit) as ended:
        dispatch(["stop", str(tmp_path), "--wait=0.1"])
    assert ended.value.code == 1
    assert "is still at work on n1" in capsys.readouterr().err
    assert (tmp_path / "STOP").exists()


def test_a_beat_that_cannot_be_read_once_is_no_good_bye(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where its host replaces it over a network's file system."""
    beat(tmp_path)
    looks = iter([False, True, True, False, True, False, False])

    def read(folder: Path) -> list[Beat]:
        return read_beats(folder) if next(looks) else []

    monkeypatch.setattr(stop, "read_beats", read)
    dispatch(["stop", str(tmp_path)])
    assert list(looks) == []


@pytest.mark.parametrize(("age", "phase"), [(40.0, "data"), (0.0, "ended")])
def test_nobody_is_asked_where_nobody_is(
    age: float, phase: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    beat(tmp_path, age, phase)
    with pytest.raises(SystemExit):
        dispatch(["stop", str(tmp_path)])
    assert "none of its ranks is at work" in capsys.readouterr().err
    assert not (tmp_path / "STOP").exists()

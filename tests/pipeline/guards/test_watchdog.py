"""When a rank ends itself over a stall, and that it does so whatever else goes wrong."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipeline.guards import lookout, watchdog
from pipeline.guards.heartbeat import Heart, beat_file
from pipeline.guards.watchdog import Watchdog


class Ended(BaseException):
    """In the place of the process's end."""


@pytest.fixture
def heart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Heart:
    """Rank 0 of two, past its first step."""

    def end(code: int) -> None:
        raise Ended(code)

    monkeypatch.setattr(watchdog.os, "_exit", end)
    monkeypatch.setattr(watchdog, "GRACE", 0.0)
    # The other rank's process is, for these tests, this one.
    monkeypatch.setattr(watchdog.os, "kill", lambda *_: None)
    heart = Heart(0, 2)
    heart.beat_into(tmp_path, "one")
    for step in (3, 4):
        heart.begin_step(step, "vote")
    return heart


def other(heart: Heart, moment: float, **changes: Any) -> None:
    """Rank 1 writes at `moment` that it lives, one phase behind unless told otherwise."""
    assert heart.folder is not None
    told = {"rank": 1, "step": 3, "phase": "save", "since": time.time(), "time": moment, **changes}
    beat = dataclasses.replace(heart.current(), **told)
    beat_file(heart.folder, 1).write_text(json.dumps(dataclasses.asdict(beat)))


def stand(heart: Heart, seconds: float) -> None:
    """As if the main thread had been in its phase for so long."""
    heart._now = heart._now._replace(since=time.monotonic() - seconds)


def looked_twice(heart: Heart, **changes: Any) -> Watchdog:
    """A watchdog that has seen rank 1 at half of its patience, and is about to look again."""
    dog = Watchdog(heart, 300.0)
    dog._resumed -= 1000
    stand(heart, 200)
    other(heart, 1.0)
    dog.look()
    time.sleep(0.005)  # two looks in one millisecond would show this rank's own beat unchanged
    stand(heart, 301)
    other(heart, 2.0 if changes else 1.0, **changes)
    return dog


def test_a_rank_that_may_still_save_is_waited_for(heart: Heart) -> None:
    dog = looked_twice(heart, since=2.0 - 400)
    dog.look()
    dog._again = 0.0
    # Past what a save may take.
    other(heart, 3.0, since=3.0 - 1801)
    with pytest.raises(Ended):
        dog.look()


@pytest.mark.parametrize("changes", [{"since": 2.0 - 301, "phase": "data"}, {}])
def test_one_that_stands_still_or_is_silent_is_not(heart: Heart, changes: dict[str, Any]) -> None:
    with pytest.raises(Ended):
        looked_twice(heart, **changes).look()


def test_time_in_which_the_process_was_stopped_costs_no_patience(heart: Heart) -> None:
    dog = looked_twice(heart)
    dog._looked -= 1000
    dog.look()
    assert heart.folder is not None
    time.sleep(0.005)
    dog._resumed -= 301
    other(heart, 1.0)
    dog.look()
    with pytest.raises(Ended):
        dog.look()


def test_it_ends_whatever_the_others_do_meanwhile(
    heart: Heart, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def gone(pid: int, *_: object) -> Any:
        raise psutil.NoSuchProcess(pid)

    def unkillable(pid: int, number: int) -> None:
        raise ProcessLookupError(pid, number)

    monkeypatch.setattr(watchdog, "stack_of", gone)
    monkeypatch.setattr(os, "kill", unkillable)
    with pytest.raises(Ended) as ended:
        looked_twice(heart).look()
    assert ended.value.args == (watchdog.FAULT,)
    assert "rank 1 (host" in capsys.readouterr().err


def test_on_a_full_disk_nobody_is_blamed_for_silence(
    heart: Heart, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    killed: list[int] = []
    monkeypatch.setattr(os, "kill", lambda pid, _: killed.append(pid))
    dog = looked_twice(heart)
    monkeypatch.setattr(os, "replace", full)
    heart.write()
    with pytest.raises(Ended):
        dog.look()
    told = capsys.readouterr().err
    assert "rank 0 (host" in told
    assert "heartbeats cannot be written; make room in" in told
    assert "no sign of life" not in told
    assert killed == []


def test_a_rank_that_sees_no_other_blames_nobody(
    heart: Heart, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The folder of a thousand files may not be read in time."""
    dog = looked_twice(heart)
    monkeypatch.setattr(lookout, "read_beats", lambda _: [])
    with pytest.raises(Ended):
        dog.look()
    told = capsys.readouterr().err
    assert "who is behind is not known: heartbeats cannot be read; see to the disk of" in told
    assert "stands still" not in told


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")

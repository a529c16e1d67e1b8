"""What a rank says of itself, and who reads it."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from pipeline.guards.causes import cause_of, lost_sentence
from pipeline.guards.heartbeat import (
    Heart,
    beat_file,
    is_alive,
    newest_launch,
    read_beats,
)
from pipeline.guards.lookout import within
from pipeline.options import Fault


def test_a_beat_says_where_the_main_thread_is(tmp_path: Path) -> None:
    heart = Heart(3, 4)
    heart.beat_into(tmp_path, "one")
    heart.begin_step(7, "data")
    heart.begin("forward")
    heart.write()
    (beat,) = read_beats(tmp_path)
    assert (beat.rank, beat.world_size, beat.pid) == (3, 4, os.getpid())
    assert (beat.step, beat.phase, beat.laps) == (7, "forward", 1)
    assert beat.place == "phase forward of step 8"
    assert abs(beat.time - time.time()) < 5
    assert beat.since <= beat.time
    assert is_alive(beat)
    assert heart.is_first_step
    heart.begin_step(8, "data")
    assert not heart.is_first_step


def test_the_thread_goes_on_writing_and_good_bye_is_last(tmp_path: Path) -> None:
    looked: list[float] = []
    heart = Heart()
    heart.interval = 0.01
    heart.watch(lambda: looked.append(time.monotonic()))
    heart.start()
    heart.beat_into(tmp_path, "one")
    before = read_beats(tmp_path)[0].time
    deadline = time.monotonic() + 20
    while read_beats(tmp_path)[0].time == before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert read_beats(tmp_path)[0].time > before
    assert looked
    heart.close("it broke")
    heart.close()
    heart.write()  # by a thread that was about to, as the good-bye was said
    (beat,) = read_beats(tmp_path)
    assert (beat.phase, beat.error) == ("failed", "it broke")


def test_noting_a_phase_costs_next_to_nothing() -> None:
    heart = Heart()
    started = time.process_time()
    for _ in range(10_000):
        heart.begin("forward")
    assert time.process_time() - started < 0.5  # measured: 0.01


def test_a_full_disk_stops_no_beat(tmp_path: Path) -> None:
    heart = Heart()
    heart.beat_into(tmp_path / "beats", "one")
    for file in (tmp_path / "beats").iterdir():
        file.unlink()
    (tmp_path / "beats").rmdir()
    heart.write()
    assert read_beats(tmp_path / "beats") == []


def test_beats_of_an_earlier_launch_and_broken_ones_are_left_out(tmp_path: Path) -> None:
    old, new = Heart(2, 3), Heart(0, 2)
    old.beat_into(tmp_path, "one")
    time.sleep(0.002)
    new.beat_into(tmp_path, "two")
    beat_file(tmp_path, 1).write_text('{"rank": 1, "torn')
    assert [beat.rank for beat in read_beats(tmp_path)] == [0, 2]
    assert [beat.rank for beat in newest_launch(read_beats(tmp_path))] == [0]
    assert newest_launch([]) == []


def test_a_clock_that_is_set_makes_no_rank_another_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heart = Heart()
    heart.beat_into(tmp_path, "one")
    (beat,) = read_beats(tmp_path)
    host_began = psutil.boot_time()
    # The kernel moves it with its clock.
    monkeypatch.setattr("psutil._pslinux.boot_time", lambda: host_began + 3600)
    assert is_alive(beat)
    assert not is_alive(dataclasses.replace(beat, created=beat.created - 5))


def a_dead_rank(folder: Path, heart: Heart) -> None:
    """Rank 1's last beat, its process gone."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    beat = dataclasses.replace(heart.current(), rank=1, pid=process.pid, phase="backward", step=4)
    beat_file(folder, 1).write_text(json.dumps(dataclasses.asdict(beat)))


def test_a_broken_collective_is_explained_by_the_rank_that_is_gone(tmp_path: Path) -> None:
    heart = Heart(0, 2)
    heart.beat_into(tmp_path, "one")
    reset = RuntimeError("[gloo/tcp/pair.cc:538] Read error [10.0.0.2]:1: Connection reset by peer")
    assert cause_of(reset, heart) is None
    a_dead_rank(tmp_path, heart)
    found = cause_of(reset, heart)
    assert isinstance(found, Fault)
    assert "is gone; it was last seen in phase backward of step 5" in str(found)
    assert (found.told_by, found.exit_code) == (0, 1)
    # Another error is its own cause.
    assert cause_of(RuntimeError("mat1 and mat2 shapes cannot be multiplied"), heart) is None


def test_a_rank_that_failed_tells_its_own_error(tmp_path: Path) -> None:
    mine, other = Heart(0, 2), Heart(1, 2)
    for heart in (mine, other):
        heart.beat_into(tmp_path, "one")
    other.begin_step(4, "data")
    other.close("shard x is damaged")
    found = cause_of(RuntimeError("Connection closed by peer"), mine)
    assert found is not None
    assert found.told_by == 1
    assert "failed in step 5: shard x is damaged" in str(found)


def test_every_rank_that_is_gone_is_named() -> None:
    gone = [dataclasses.replace(Heart(rank, 4).current(), host=f"n{rank}") for rank in (1, 3)]
    told = lost_sentence(gone)
    assert "rank 1 (host n1" in told
    assert "rank 3 (host n3" in told


def test_a_disk_that_hangs_keeps_nobody_from_ending() -> None:
    started = time.monotonic()
    assert within(0.05, lambda: time.sleep(5) or 1, 2) == 2
    assert within(30, lambda: 1, 2) == 1
    assert time.monotonic() - started < 4


@pytest.mark.parametrize("module", ["heartbeat", "stalls", "watchdog", "launcher", "attempt"])
def test_guards_need_no_torch(module: str) -> None:
    code = f"import sys, pipeline.guards.{module}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)

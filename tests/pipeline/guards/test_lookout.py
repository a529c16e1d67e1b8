"""Of many ranks a few read all beats for the others, whichever of them can."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.guards import lookout
from pipeline.guards.heartbeat import Beat, Heart, read_beats
from pipeline.guards.lookout import Lookout


@pytest.fixture
def hearts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Heart]:
    """Five ranks, more than read for themselves, whose turns come quickly."""
    monkeypatch.setattr(lookout, "RANKS_A_SECOND", 4)
    monkeypatch.setattr(lookout, "DISK", 1.0)  # of which a rank waits a half for those before it
    monkeypatch.setattr(lookout, "TURN", 0.01)
    hearts = [Heart(rank, 5) for rank in range(5)]
    for heart in hearts:
        heart.interval = 0.0
        heart.beat_into(tmp_path, "one")
    return hearts


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Grows with every look at all files."""
    made: list[Path] = []

    def counted(folder: Path) -> list[Beat]:
        made.append(folder)
        return read_beats(folder)

    monkeypatch.setattr(lookout, "read_beats", counted)
    return made


def ranks(beats: list[Beat]) -> list[int]:
    return [beat.rank for beat in beats]


def test_rank_0_reads_for_all(hearts: list[Heart], reads: list[Path]) -> None:
    seen = [ranks(Lookout(heart).others()) for heart in hearts]
    assert seen == [[r for r in range(5) if r != rank] for rank in range(5)]
    assert len(reads) == 1


def test_where_rank_0_does_not_another_does(hearts: list[Heart], reads: list[Path]) -> None:
    assert ranks(Lookout(hearts[3]).others()) == [0, 1, 2, 4]
    assert ranks(Lookout(hearts[1]).others()) == [0, 2, 3, 4]
    assert len(reads) == 1


def test_a_second_look_sees_newer_beats_than_the_first(
    hearts: list[Heart], reads: list[Path]
) -> None:
    for heart in hearts:
        heart.interval = 0.05
    one = Lookout(hearts[2])
    first = one.others()
    for heart in hearts:
        heart.begin_step(7, "data")
        heart.write()
    second = one.others()
    assert {beat.step for beat in first} == {0}
    assert {beat.step for beat in second} == {7}
    assert len(reads) == 2


def test_an_earlier_start_and_an_old_look_say_nothing(
    hearts: list[Heart], reads: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Lookout(hearts[0]).others()
    for heart in hearts:
        heart.beat_into(tmp_path, "two")
    assert {beat.launch for beat in Lookout(hearts[1]).others()} == {"two"}
    assert len(reads) == 2
    monkeypatch.setattr(lookout, "FRESH", -1.0)
    Lookout(hearts[1]).others()
    assert len(reads) == 3


def test_a_few_ranks_read_for_themselves_and_leave_nothing(tmp_path: Path) -> None:
    hearts = [Heart(rank, 2) for rank in range(2)]
    for heart in hearts:
        heart.beat_into(tmp_path, "one")
    assert ranks(Lookout(hearts[1]).others()) == [0]
    assert not (tmp_path / "all.json").exists()

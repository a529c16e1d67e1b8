"""Who no longer answers is found out over the network, whatever collectives and folders say."""

from __future__ import annotations

import os
import time

import pytest

from tests.distributed.harness import run_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.soak]


def _find(lost: list[int]) -> tuple[str, int]:
    """All meet; the ranks in `lost` no longer count; who the others say is gone, and who tells."""
    from pipeline.rendezvous import Meeting, Place

    place = Place.of(os.environ)
    meeting = Meeting(place, 30)
    meeting.hosts = ["n0", "n1", "n1"]
    time.sleep(2)  # all have met
    if place.rank in lost:
        meeting.leave()
        time.sleep(8)  # rank 0's store lives as long as its process
        return "", 0
    time.sleep(1)
    found = meeting.name_lost()
    time.sleep(3)  # likewise
    meeting.leave()
    return found


@pytest.mark.parametrize(
    ("lost", "told", "teller"),
    [
        ([], "", 0),
        ([1, 2], "n1 (ranks 1-2) no longer answers {}", 0),
        ([0], "n0 (rank 0) no longer answers {}", 1),
    ],
)
def test_those_that_no_longer_count_are_named_by_all_others(
    lost: list[int], told: str, teller: int
) -> None:
    names = ["n0 (rank 0)", "n1 (rank 1)", "n1 (rank 2)"]
    for rank, found in enumerate(run_ranks(_find, 3, lost)):
        if rank not in lost:
            assert found[0].startswith(told.format(names[rank]))
            assert bool(found[0]) == bool(lost)
            assert found[1] == teller

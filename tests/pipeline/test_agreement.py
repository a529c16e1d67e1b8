"""What nodes state is compared, and the one that differs is named with its ranks."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.agreement import Facts, clock_problem, heals, name_ranks, spans, verdict


def facts(host: str, **same: str) -> Facts:
    """Of one rank."""
    return Facts(host, same=same)


def test_what_keeps_a_run_from_starting_heals_only_where_all_of_it_does() -> None:
    locked = Facts("n0", "is working on it", {"code": "1"}, may_heal=True)
    assert heals([locked, facts("n1", code="1")])
    assert not heals([locked, facts("n1", code="2")])
    assert not heals([locked, Facts("n1", "no such data", {"code": "1"})])


@pytest.mark.parametrize(
    ("ranks", "text"),
    [([3], "rank 3"), ([0, 1, 2, 5], "ranks 0-2, 5"), ([0, 2], "ranks 0, 2")],
)
def test_ranks_are_told_in_spans(ranks: list[int], text: str) -> None:
    assert spans(ranks) == text


@given(st.sets(st.integers(0, 300), min_size=1))
def test_spans_hold_exactly_the_ranks(ranks: set[int]) -> None:
    found: list[int] = []
    for span in spans(sorted(ranks)).partition(" ")[2].split(", "):
        low, _, high = span.partition("-")
        found += range(int(low), int(high or low) + 1)
    assert found == sorted(ranks)


def test_many_nodes_are_not_all_told() -> None:
    told = name_ranks([f"n{rank // 8}" for rank in range(800)], range(800))
    assert told.startswith("n0 (ranks 0-7), n1 (ranks 8-15), ")
    assert told.endswith("n7 (ranks 56-63), and 92 more nodes")


def test_equal_facts_start_the_run_and_they_survive_the_way() -> None:
    sent = [Facts("n0", "", {"torch": "2"}, {"a.py": "1"}, {"run_dir": 5}, "eth0")] * 3
    assert verdict([Facts.from_json(each.to_json()) for each in sent]) == ""
    assert Facts.from_json(sent[0].to_json()) == sent[0]


def test_the_few_are_named_against_the_many_even_where_rank_0_is_of_them() -> None:
    told = verdict([facts("n0", torch="1"), *[facts(f"n{i}", torch="2") for i in (1, 2)]])
    assert told == (
        "torch: n0 (rank 0) has 1, n1 (rank 1), n2 (rank 2) have 2; install the same on every node"
    )


def test_of_two_nodes_the_second_differs() -> None:
    told = verdict([facts("n0", data="a" * 64)] * 2 + [facts("n1", data="b" * 64)] * 2)
    assert told == (
        "data: n1 (ranks 2-3) has bbbbbbbbbbbb, n0 (ranks 0-1) has aaaaaaaaaaaa; bring the same "
        "folder to every node"
    )


def test_other_code_names_its_files() -> None:
    one = Facts("n0", same={"code": "x"}, code={"a.py": "1", "b.py": "1", "c.py": "1"})
    two = Facts("n1", same={"code": "y"}, code={"a.py": "1", "b.py": "2", "d.py": "1"})
    assert "n1 (rank 1) has y (other b.py, c.py, d.py), n0" in verdict([one, two])
    none = Facts("n1", same={"code": "z"}, code={})
    assert "(other a.py, b.py, c.py)" in verdict([one, none])


def test_a_problem_of_all_is_told_once_and_one_of_a_node_with_its_name() -> None:
    wrong = Facts("n0", "lr='x': not a number", {"code": "1"})
    assert verdict([wrong, wrong]) == "lr='x': not a number"
    missing = Facts("n1", "data='/d': no manifest", {"code": "2"})
    told = verdict([facts("n0", code="1", data="5"), missing])
    assert told.startswith("n1 (rank 1): data='/d': no manifest; code: n1 (rank 1) has 2")
    assert "data: " not in told


def test_a_clock_that_is_off_is_named_and_small_skew_is_borne() -> None:
    hosts = ["n0", "n0", "n1", "n2"]
    assert clock_problem(hosts, [0, 0.001, 2, -2]) == ""
    assert clock_problem(hosts, [0, 0, 61.2, 0]).startswith("clock: n1 (rank 2) is +61.2 s from")
    assert clock_problem(["n0", "n1"], [0, -9]).startswith("clock: n1 (rank 1) is -9.0 s from")
    # Rank 0's own clock is the wrong one.
    assert clock_problem(hosts, [0, 60, 60, 60]).startswith("clock: n0 (rank 0) is -60.0 s from")

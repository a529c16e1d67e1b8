"""Damaged inputs: refused in one line, or read as an independent reader reads them."""

from pathlib import Path

from tests.tools.corpus_mutations import check_outcomes, fuzz, make_kinds

COUNT = 350


def test_damaged_inputs_are_refused_or_read_right(tmp_path: Path) -> None:
    kinds = make_kinds(tmp_path)
    check_outcomes(fuzz(kinds, COUNT, seed=1))

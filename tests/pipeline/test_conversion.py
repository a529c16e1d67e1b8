"""Values become what a field is declared as, from text and from YAML, and nothing else."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from pipeline.conversion import convert

NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
VALUES = {int: st.integers(), float: NUMBERS, bool: st.booleans()}


@given(st.sampled_from(list(VALUES)).flatmap(lambda hint: st.tuples(st.just(hint), VALUES[hint])))
def test_a_value_is_the_same_typed_as_text_and_from_a_file(drawn: tuple[type, Any]) -> None:
    hint, value = drawn
    for given_as in (value, str(value), yaml.safe_load(yaml.safe_dump(value))):
        made = convert(given_as, hint)
        assert (type(made), made) == (hint, value)


@pytest.mark.parametrize("text", ["None", "1_000", "a,b", "1e-3", "true"])
def test_where_text_is_asked_for_everything_is_text(text: str) -> None:
    assert convert(text, str) == text
    assert convert(text, Any) == text


@pytest.mark.parametrize(
    ("value", "hint", "remedy"),
    [
        (True, int, "a whole number"),
        (1.5, int, "a whole number"),
        ("1.5", int | None, "a whole number"),
        (True, float, "such as 0.001"),
        ("inf", float, "such as 0.001"),
        (1, bool, "true or false"),
        (3, str, "quotes"),
        ("c", Literal["a", "b"], "a, b"),
        (3, tuple[str, ...], "commas"),
        ("book", dict[str, float], "name=value"),
        (["book"], dict[str, float], "name: value"),
        ("book=many", dict[str, float], "such as 0.001"),
    ],
)
def test_what_is_not_of_the_type_is_refused_with_the_remedy(
    value: object, hint: Any, remedy: str
) -> None:
    with pytest.raises(ValueError, match=remedy):
        convert(value, hint)

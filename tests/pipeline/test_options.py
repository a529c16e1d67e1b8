"""Strict options: nothing is guessed, every mistake is told at once."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.options import UserError, load, option, parse_command_line


@dataclasses.dataclass(frozen=True)
class Example:
    """An example."""

    out: str = option("a folder", metavar="DIR", positional=True)
    size: int = option("a size", 3, minimum=1)
    rate: float = option("a rate", 0.5)
    resume: bool = option("go on", True)
    kind: Literal["a", "b"] = option("a kind", "a")
    names: tuple[str, ...] = option("names", ())
    weights: dict[str, float] = option("weights", default_factory=dict)
    model: dict[str, Any] = option("overrides", default_factory=dict)
    limit: int | None = option("a limit", None)


def parse(*argv: str) -> Example:
    return parse_command_line(Example, argv, "example")


def test_every_kind_of_value() -> None:
    got = parse(
        *("here", "--size", "7", "--rate=1e-3", "--resume=false", "--kind", "b", "--names=x,y"),
        *("--weights", "book=2,c4=.5", "--model.num_layers=3", "--limit", "none"),
    )
    assert got == Example(
        "here", 7, 1e-3, False, "b", ("x", "y"), {"book": 2.0, "c4": 0.5}, {"num_layers": "3"}
    )


@given(st.text(min_size=1).filter(lambda text: not text.startswith("-") and "\0" not in text))
def test_text_stays_as_it_was_given(text: str) -> None:
    """fire alone would make numbers, lists and None of some of these."""
    assert parse(f"--out={text}").out == text
    assert parse("--out", text).out == text


@given(st.integers(min_value=1))
def test_whole_numbers_of_any_length(number: int) -> None:
    assert parse("x", "--size", str(number)).size == number


def test_a_negative_number_is_a_value_and_not_a_flag() -> None:
    assert parse("x", "--rate", "-2").rate == -2.0


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["x", "--sise", "3"], ["sise='3'", "did you mean size?"]),
        (["x", "--size", "many"], ["size='many'", "not a whole number"]),
        (["x", "--size", "1.5"], ["size='1.5'", "not a whole number"]),
        (["x", "--size", "0"], ["size='0'", "give at least 1"]),
        (["x", "--resume", "maybe"], ["resume='maybe'", "true or false"]),
        (["x", "--kind", "c"], ["kind='c'", "a, b"]),
        (["x", "--weights", "book"], ["weights='book'", "name=value"]),
        (["x", "--limit", "few"], ["limit='few'", "not a whole number"]),
        (["x", "y"], ["y: stands without a flag"]),
        (["x", "--out", "y"], ["out='x'", "given twice"]),
        (["x", "--size", "1", "--size=2"], ["--size: given twice"]),
        (["x", "-", "y"], ["a lone dash"]),
        (["x", "--rate", "nan"], ["rate='nan'", "finite"]),
        ([], ["out: missing; give --out DIR"]),
    ],
)
def test_a_mistake_names_field_value_and_remedy(argv: list[str], parts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        parse(*argv)
    for part in parts:
        assert part in str(caught.value)


def test_all_mistakes_are_told_at_once() -> None:
    with pytest.raises(UserError) as caught:
        parse("--sise", "3", "--rate", "fast", "--kind", "z")
    assert str(caught.value).count(";") >= 4
    for word in ("sise", "rate", "kind", "out: missing"):
        assert word in str(caught.value)


def test_typed_values_from_a_file_are_checked_and_not_coerced() -> None:
    assert load(Example, {"out": "x", "size": 4, "rate": 1, "weights": {"c4": 1}}).rate == 1.0
    for wrong in ({"size": True}, {"size": "x"}, {"resume": 1}, {"out": 3}, {"rate": True}):
        with pytest.raises(UserError):
            load(Example, {"out": "x", **wrong})


def test_help_names_every_option_and_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse("--help")
    assert ended.value.code == 0
    page = capsys.readouterr().out
    for field in dataclasses.fields(Example):
        assert f"--{field.name} " in page
    assert "(default: 3)" in page
    assert "(default: true)" in page

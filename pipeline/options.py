"""From flags and files to one frozen dataclass, strictly.

Every command and entry point describes what it takes as one frozen dataclass whose fields are made
by `option`. `parse_command_line` turns argv into it, `load` turns any mapping into it, and both
report *every* mistake at once, before any work, each naming the field, the value and the remedy.

fire splits the command line but interprets nothing (`SetParseFn(str)`): left alone it would turn
`1_000`, `None` and `a,b` into other types and pass `--resume=false` as a truthy string.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from pipeline.conversion import convert, is_mapping

T = TypeVar("T")
_REQUIRED = dataclasses.MISSING
PLACES = ("DIR", "FILE", "GLOB")


class UserError(ValueError):
    """A mistake of the user's: shown as one line naming field, value and remedy; exit code 2.

    Attributes:
        exit_code: of the process that it ends.
        told_by: the rank that tells it; every rank has found it.
    """

    exit_code = 2
    told_by = 0


class AgreedError(UserError):
    """What every rank knows of before it ends: rank 0 tells it, and nobody waits."""

    def __init__(self, text: str, *, exit_code: int = 2) -> None:
        super().__init__(text)
        self.exit_code = exit_code


class Fault(UserError):
    """Nobody's mistake (a rank that died, a port that is taken): another start may succeed."""

    exit_code = 1

    def __init__(self, text: str, *, told_by: int = 0) -> None:
        super().__init__(text)
        self.told_by = told_by


def option(
    help: str,
    default: Any = _REQUIRED,
    *,
    default_factory: Any = _REQUIRED,
    metavar: str = "",
    positional: bool = False,
    after_dashes: bool = False,
    minimum: float | None = None,
) -> Any:
    """A dataclass field with what `--help` and the checks need.

    Args:
        help: one line, with the unit.
        default: value when the flag is absent; without it the flag is required.
        metavar: what stands for the value in the help, such as FILE.
        positional: also taken by position on the command line.
        after_dashes: taken from all the words behind a `--`, as they stand.
        minimum: smallest value a number may have.
    """
    metadata = {
        "help": help,
        "metavar": metavar,
        "positional": positional,
        "after_dashes": after_dashes,
        "minimum": minimum,
    }
    if default_factory is not _REQUIRED:
        return dataclasses.field(default_factory=default_factory, metadata=metadata)
    if default is not _REQUIRED:
        return dataclasses.field(default=default, metadata=metadata)
    return dataclasses.field(metadata=metadata)


def load(cls: type[T], values: Mapping[str, object], *, source: str = "flags") -> T:
    """Build `cls` from `values`, strictly.

    Dotted keys (`model.num_layers`) and nested mappings both reach into mapping fields. A class may
    define `problems(self) -> Iterable[str]` for what single fields cannot say.

    Raises:
        UserError: naming every unknown key, wrong type, missing field and impossible combination.
    """
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}  # type: ignore[arg-type]
    problems: list[str] = []
    nested: dict[str, object] = {}
    for key, value in values.items():
        head, _, rest = key.partition(".")
        if rest and head in fields and is_mapping(hints[head]):
            inner = nested.setdefault(head, {})
            if isinstance(inner, dict):
                inner[rest] = value
        elif key in fields and isinstance(nested.get(key), dict) and isinstance(value, Mapping):
            nested[key] = {**value, **nested[key]}  # type: ignore[dict-item]
        elif key in fields:
            nested[key] = value
        else:
            close = difflib.get_close_matches(key, fields, n=1)
            remedy = f"did you mean {close[0]}?" if close else "see --help for what there is"
            problems.append(f"{key}={value!r}: not an option of {source}; {remedy}")
    arguments: dict[str, Any] = {}
    for name, field in fields.items():
        if name not in nested:
            if field.default is _REQUIRED and field.default_factory is _REQUIRED:
                kind = field.metadata.get("metavar") or "value"
                problems.append(f"{name}: missing; give --{name} {kind}")
            continue
        try:
            arguments[name] = convert(nested[name], hints[name])
            minimum = field.metadata.get("minimum")
            value = arguments[name]
            if value == "" and field.metadata.get("metavar") in PLACES:
                raise ValueError("empty; give a path")
            if (
                minimum is not None
                and isinstance(value, (int, float))
                and not isinstance(value, bool)
                and not value >= minimum
            ):
                raise ValueError(f"too small; give at least {minimum}")
        except ValueError as error:
            problems.append(f"{name}={nested[name]!r}: {error}")
    if not problems:
        made = cls(**arguments)
        check: Callable[[], Iterable[str]] | None = getattr(made, "problems", None)
        problems.extend(check() if check is not None else ())
        if not problems:
            return made
    raise UserError("; ".join(problems))


def parse_command_line(cls: type[T], argv: Sequence[str], prog: str) -> T:
    """`argv` (without the program's name) as `cls`.

    `--help` prints what `cls` takes and exits with 0. Raises UserError for every mistake at once.
    """
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    behind = next((f.name for f in fields if f.metadata.get("after_dashes")), None)
    words_behind: Sequence[str] = ()
    if behind is not None and "--" in argv:
        argv, words_behind = argv[: argv.index("--")], argv[argv.index("--") + 1 :]
    if any(word in ("--help", "-h") for word in argv):
        print(help_text(cls, prog))
        sys.exit(0)
    values = split_flags(argv)
    if behind is not None:
        values[behind] = words_behind
    positional = [f.name for f in fields if f.metadata.get("positional")]
    words = values.pop("", [])
    if len(words) > len(positional):
        extra = words[len(positional) :]
        raise UserError(
            f"{' '.join(extra)}: stands without a flag; quote a glob so that the shell leaves it "
            f"alone, and see {prog} --help"
        )
    for name, word in zip(positional, words, strict=False):
        if name in values:
            raise UserError(f"{name}={word!r}: given twice; keep one")
        values[name] = word
    return load(cls, values, source=prog)


def split_flags(argv: Sequence[str]) -> dict[str, Any]:
    """`argv` as a mapping from flag to text; what stands without a flag is under ''."""
    import fire

    seen: set[str] = set()
    for word in argv:
        if word in ("-", "--"):
            raise UserError(f"{word}: a lone dash means nothing here; remove it")
        if word.startswith("--"):
            name = word[2:].partition("=")[0].replace("-", "_")
            if name in seen:
                raise UserError(f"--{name}: given twice; keep one")
            seen.add(name)
    caught: dict[str, Any] = {}

    @fire.decorators.SetParseFn(str)
    def collect(*words: str, **flags: str) -> None:
        caught.update(flags)
        caught[""] = list(words)

    fire.Fire(collect, command=_joined(argv), name="isoflop")
    return caught


def _joined(argv: Sequence[str]) -> list[str]:
    """`--name value` as `--name=value`, so that a value may begin with a dash as in `--seed -1`."""
    joined: list[str] = []
    words = list(argv)
    while words:
        word = words.pop(0)
        if word.startswith("--") and "=" not in word:
            takes_next = words and (not words[0].startswith("-") or _is_number(words[0]))
            word = f"{word}={words.pop(0)}" if takes_next else f"{word}=true"
        joined.append(word)
    return joined


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def help_text(cls: type, prog: str) -> str:
    """The help page of the command `prog` that takes `cls`."""
    hints = typing.get_type_hints(cls)
    fields = [field for field in dataclasses.fields(cls) if field.init]
    behind = [field for field in fields if field.metadata.get("after_dashes")]
    fields = [field for field in fields if field not in behind]
    usage = [prog]
    for field in fields:
        if field.metadata.get("positional"):
            usage.append(_metavar(field, hints))
        elif field.default is _REQUIRED and field.default_factory is _REQUIRED:
            usage.append(f"--{field.name} {_metavar(field, hints)}")
    usage.append("[--option VALUE …]")
    usage += [f"-- {_metavar(field, hints)}" for field in behind]
    lines = ["usage: " + " ".join(usage), "", inspect.cleandoc(cls.__doc__ or ""), "", "options:"]
    for field in fields:
        lines.append(f"  --{field.name} {_metavar(field, hints)}")
        text = field.metadata.get("help", "")
        default = field.default
        if default is not _REQUIRED and default not in (None, "", ()):
            text += f" (default: {str(default).lower() if isinstance(default, bool) else default})"
        lines += textwrap.wrap(text, 92, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(lines)


def _metavar(field: dataclasses.Field[Any], hints: Mapping[str, Any]) -> str:
    if field.metadata.get("metavar"):
        return str(field.metadata["metavar"])
    hint = hints[field.name]
    if get_origin(hint) in (Union, types.UnionType):
        hint = next(a for a in get_args(hint) if a is not type(None))
    if get_origin(hint) is Literal:
        return "|".join(str(a) for a in get_args(hint))
    if is_mapping(hint):
        return "NAME=VALUE,…"
    return {int: "N", float: "X", bool: "true|false"}.get(hint, "TEXT")

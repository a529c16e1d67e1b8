"""Instruction rows shaped like FLAN's, made of real functions and classes.

Two kinds of holding out: whole tasks, and functions. A function or class goes to one side by the
hash of its summary line, so equal ones stay together; held-out tasks are made of held-out functions
alone, and so no function's text is on both sides.
"""

from __future__ import annotations

import ast
import gzip
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tools.sample_corpus.gather import Installation
from tools.sample_corpus.syntax import Function, functions, parse, signature

TASK_SOURCE = "PythonCode"
_HELDOUT = 0.1  # of the functions
_ROWS = 1500  # at most, of a training task
_HELDOUT_ROWS = 150  # at most, of a task in the held-out split
_UNITS_PER_MEGABYTE = 250  # of the corpus beside which they stand
_FEWEST_UNITS, _ENOUGH_UNITS = 300, 4000
_SOURCE_CHARACTERS = 400  # longer functions are passed over where the source is shown
_EXAMPLE_CHARACTERS = 150  # longer ones are not put in front as an example
_HIDDEN = "____"


@dataclass(frozen=True)
class Unit:
    """A documented function or class.

    Attributes:
        module: dotted name.
        name: its own.
        signature: the `def` line; of a class, its `class` line.
        summary, rest: first line of its docstring, and what follows.
        source: its text without the docstring; "" where too long, or for classes.
        members: a class's public methods, a function's parameters.
        is_class: whether it is one.
    """

    module: str
    name: str
    signature: str
    summary: str
    rest: str
    source: str
    members: tuple[str, ...]
    is_class: bool

    @property
    def held_out(self) -> bool:
        """The side it is on."""
        return _fraction(self.summary) < _HELDOUT


def _fraction(*parts: object) -> float:
    digest = hashlib.sha256("\0".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


@dataclass(frozen=True)
class TaskKind:
    """A task: how a unit becomes a question and an answer, and how the question is put.

    Attributes:
        name: as in the rows.
        make: a unit to (what is asked about, answer), or None where it does not fit.
        templates: prompts with {} for what is asked about.
        held_out: whether the whole task is.
    """

    name: str
    make: Callable[[Unit], tuple[str, str] | None]
    templates: tuple[str, str]
    held_out: bool = False


def _if(condition: object, question: str, answer: str) -> tuple[str, str] | None:
    return (question, answer) if condition and question.strip() and answer.strip() else None


TASKS = (
    TaskKind(
        "signature_to_summary",
        lambda u: _if(not u.is_class, u.signature, u.summary),
        ("{}\n\nWhat does this Python function do?", "Describe in one line:\n\n{}\n"),
    ),
    TaskKind(
        "docstring_to_summary",
        lambda u: _if(len(u.rest) > 80, u.rest[:_SOURCE_CHARACTERS], u.summary),
        ("{}\n\nWrite the first line of this docstring.", "Summarise in one line:\n\n{}\n"),
    ),
    TaskKind(
        "source_to_name",
        lambda u: _if(
            u.source and not u.name.startswith("__"), u.source.replace(u.name, _HIDDEN), u.name
        ),
        (
            f"{{}}\n\nWhat should the function {_HIDDEN} be called?",
            f"Give the name that {_HIDDEN} hides:\n\n{{}}\n",
        ),
    ),
    TaskKind(
        "docstring_to_signature",
        lambda u: _if(not u.is_class, f"{u.summary}\n{u.rest[:200]}".strip(), u.signature),
        ("Write the def line of a Python function:\n\n{}\n", "{}\n\nWhich signature fits?"),
    ),
    TaskKind(
        "class_to_methods",
        lambda u: _if(u.is_class, f"{u.signature}\n    {u.summary}", ", ".join(u.members)),
        ("{}\n\nList the public methods of this class.", "Which methods has this class?\n\n{}\n"),
    ),
    TaskKind(
        "signature_to_parameters",
        lambda u: _if(not u.is_class, u.signature, ", ".join(u.members)),
        ("{}\n\nName the parameters, in order.", "Which parameters are there?\n\n{}\n"),
    ),
    TaskKind(
        "summary_to_module",
        lambda u: _if(not u.name.startswith("__"), f"{u.name}: {u.summary}", u.module),
        ("{}\n\nWhich module is this from?", "Name the Python module of this:\n\n{}\n"),
    ),
    TaskKind(
        "source_to_last_line",
        lambda u: _if(
            u.source.count("\n") > 2, u.source.rpartition("\n")[0], u.source.rpartition("\n")[2]
        ),
        ("{}\n\nWrite the last line of this function.", "Finish the code:\n\n{}\n"),
    ),
    TaskKind(
        "source_to_summary",
        lambda u: _if(u.source, u.source, u.summary),
        ("{}\n\nExplain this code in one line.", "Write a summary line for:\n\n{}\n"),
        held_out=True,
    ),
    TaskKind(
        "name_to_summary",
        lambda u: _if(not u.name.startswith("_"), f"{u.module}.{u.name}", u.summary),
        ("What is {} for?", "Say in one line what {} is."),
        held_out=True,
    ),
)


def units_of(module: str, tree: ast.Module, text: str) -> Iterator[Unit]:
    """The documented functions and classes of a module."""
    for _, node in functions(tree):
        docstring = ast.get_docstring(node)
        if docstring:
            parameters = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            names = tuple(p.arg for p in parameters if p.arg not in ("self", "cls"))
            source = _source_without_docstring(text, node)
            yield _unit(module, node.name, signature(node), docstring, source, names)
    for kind in tree.body:
        docstring = ast.get_docstring(kind) if isinstance(kind, ast.ClassDef) else None
        if isinstance(kind, ast.ClassDef) and docstring:
            methods = [n.name for n in kind.body if isinstance(n, Function)]
            public = tuple(name for name in methods if not name.startswith("_"))
            bases = ", ".join(map(ast.unparse, kind.bases))
            line = f"class {kind.name}({bases}):"
            yield _unit(module, kind.name, line, docstring, "", public, is_class=True)


def _unit(
    module: str,
    name: str,
    line: str,
    docstring: str,
    source: str,
    members: tuple[str, ...],
    is_class: bool = False,
) -> Unit:
    summary, _, rest = docstring.strip().partition("\n")
    return Unit(module, name, line, summary.strip(), rest.strip(), source, members, is_class)


def _source_without_docstring(text: str, node: Function) -> str:
    if node.end_lineno is None or len(node.body) < 2:
        return ""
    lines = text.splitlines()
    first, last = node.body[0], node.end_lineno
    kept = lines[node.lineno - 1 : first.lineno - 1] + lines[(first.end_lineno or 0) : last]
    source = "\n".join(line[node.col_offset :] for line in kept).rstrip()
    return source if len(source) <= _SOURCE_CHARACTERS else ""


def gather_units(installation: Installation, enough: int, seed: int) -> list[Unit]:
    """About `enough` units in a seeded order; each source, each signature with summary once."""
    units: list[Unit] = []
    seen: set[object] = set()
    for file in installation.code_for("instructions", seed):
        text = file.read() or ""
        tree = parse(text)
        for unit in units_of(file.module, tree, text) if tree else ():
            marks = {(unit.signature, unit.summary), unit.source or (unit.module, unit.name)}
            if len(unit.summary) > 10 and not marks & seen:
                units.append(unit)
            seen |= marks
        if len(units) >= enough:
            break
    return units


def rows_of(task: TaskKind, units: list[Unit], limit: int, seed: int) -> Iterator[dict[str, str]]:
    """Rows of one task: two templates, some with an example in front."""
    count = 0
    example: tuple[str, str] | None = None
    for unit in units:
        made = task.make(unit)
        if made is None or count == limit:
            continue
        draw = _fraction(seed, task.name, unit.module, unit.name, unit.signature)
        template = task.templates[int(draw * 2)]
        inputs = template.replace("{}", made[0])
        few_shot = example is not None and draw * 2 % 1 < 0.25
        if few_shot and example is not None:
            inputs = f"{template.replace('{}', example[0])}\n{example[1]}\n\n{inputs}"
        yield {
            "inputs": inputs,
            "targets": made[1],
            "task_source": TASK_SOURCE,
            "task_name": task.name,
            "template_type": "fs_noopt" if few_shot else "zs_noopt",
        }
        if len(made[0]) + len(made[1]) <= _EXAMPLE_CHARACTERS:
            example = made
        count += 1


def write_instructions(
    folder: Path, installation: Installation, megabytes: float, seed: int
) -> dict[str, int]:
    """Write {train,heldout}/{task}.jsonl.gz below `folder`; rows of each split come back.

    There are fewer of them beside a corpus of few `megabytes`.
    """
    enough = max(_FEWEST_UNITS, min(_ENOUGH_UNITS, int(_UNITS_PER_MEGABYTE * megabytes)))
    units = gather_units(installation, enough, seed)
    sides = {
        "train": [unit for unit in units if not unit.held_out],
        "heldout": [unit for unit in units if unit.held_out],
    }
    limits = {"train": _ROWS, "heldout": _HELDOUT_ROWS}
    report = dict.fromkeys(sides, 0)
    for split, side in sides.items():
        (folder / split).mkdir(parents=True)
        for task in TASKS:
            if split == "train" and task.held_out:
                continue
            rows = list(rows_of(task, side, limits[split], seed))
            content = "".join(json.dumps(row) + "\n" for row in rows).encode()
            # mtime 0: the same rows give the same bytes.
            (folder / split / f"{task.name}.jsonl.gz").write_bytes(gzip.compress(content, mtime=0))
            report[split] += len(rows)
    return report

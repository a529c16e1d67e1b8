"""The points of the frontier: from run folders, to and from points.csv.

A point is one held-out measurement of one model, with what it cost to get there.
"""

from __future__ import annotations

import csv
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.options import UserError
from tools.frontier.run_folder import (
    FLOP_CONVENTIONS,
    Evaluation,
    Run,
    is_run_folder,
    plain_text,
    read_run,
)

REQUIRED = ("arch", "params", "tokens", "flops", "loss")
COLUMNS = (
    *REQUIRED,
    "params_non_embedding",
    "processed_tokens",
    "loss_tokens",
    "flops_6n",
    "flops_model_causal",
    "flops_model_full",
    "flops_hardware",
    "eval_set",
    "bits_per_byte",
    "seed",
    "run",
    "step",
)
TEXT_COLUMNS = ("arch", "eval_set", "run")
MAY_BE_EMPTY = ("bits_per_byte",)
# Folders of a run that hold no other run and may hold very many files.
NOT_SEARCHED = ("checkpoints", "tensorboard", "heartbeat")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


@dataclass(frozen=True)
class Point:
    """One row of points.csv; None where a foreign table lacks the column."""

    arch: str
    params: float  # total, tied weights once; in a foreign table, by its own convention
    tokens: float  # processed by the model in training
    flops: float  # model_causal; in a foreign table, by its own convention
    loss: float  # held-out nats per matched target token
    params_non_embedding: float | None = None
    processed_tokens: float | None = None
    loss_tokens: float | None = None
    flops_6n: float | None = None
    flops_model_causal: float | None = None
    flops_model_full: float | None = None
    flops_hardware: float | None = None
    eval_set: str | None = None
    bits_per_byte: float | None = None
    seed: float | None = None
    run: str = ""
    step: float | None = None
    unigram_entropy: float | None = None  # not a column: nats of exactly the scored tokens

    @property
    def run_key(self) -> tuple[str, str]:
        """What says that two points belong to one run."""
        return self.arch, self.run


def read_runs(folder: str | Path) -> list[Run]:
    """Every run found in `folder`, itself or at any depth, by relative path.

    Runs that share a name are told apart by their folders.

    Raises:
        UserError: when there is none, or one is not in the format.
    """
    root = Path(folder)
    if not root.is_dir():
        raise UserError(f"runs={str(folder)!r}: no such folder; give one that holds run folders")
    runs = []
    for place, names, _ in os.walk(root):
        names[:] = sorted(name for name in names if name not in NOT_SEARCHED)
        if is_run_folder(Path(place)):
            relative = Path(place).relative_to(root).as_posix()
            runs.append(read_run(Path(place), root.resolve().name if relative == "." else relative))
    if not runs:
        raise UserError(
            f"runs={str(folder)!r}: no folder in it has both config.json and eval.jsonl; "
            "give the folder above your runs, after at least one evaluation"
        )
    counts = Counter(run.name for run in runs)
    return [
        replace(run, name=f"{run.name} ({run.folder})") if counts[run.name] > 1 else run
        for run in sorted(runs, key=lambda run: run.folder)
    ]


def points_of(runs: Iterable[Run]) -> list[Point]:
    """One point for each evaluation of each run, by run and step."""
    return [_point(run, evaluation) for run in runs for evaluation in run.evaluations]


def _point(run: Run, evaluation: Evaluation) -> Point:
    e = evaluation
    return Point(  # floats throughout, so that a table read back gives equal points
        arch=run.arch,
        params=float(run.params),
        tokens=float(e.processed_tokens),
        flops=float(e.flops_model_causal),
        loss=float(e.loss),
        params_non_embedding=float(run.params_non_embedding),
        processed_tokens=float(e.processed_tokens),
        loss_tokens=float(e.loss_tokens),
        **{name: float(getattr(e, name)) for name in FLOP_CONVENTIONS},
        eval_set=e.eval_set,
        bits_per_byte=e.bits_per_byte,
        seed=float(run.seed),
        run=run.name,
        step=float(e.step),
        unigram_entropy=e.unigram_entropy,
    )


def write_points(points: Iterable[Point], path: Path) -> None:
    """Write `path` in the column order of COLUMNS, under a temporary name until it is whole."""
    temporary = path.with_name(path.name + ".partial")
    with temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for point in points:
            writer.writerow([_cell(getattr(point, column)) for column in COLUMNS])
    os.replace(temporary, path)


def _cell(value: object) -> object:
    if isinstance(value, float):
        return int(value) if value.is_integer() and abs(value) < 2**53 else repr(value)
    return "" if value is None else value


def read_points(path: str | Path) -> list[Point]:
    """The points of a table: the columns of REQUIRED, and any others of COLUMNS.

    Without a `run` column each row counts as a run of its own.

    Raises:
        UserError: naming the file, line and field, for an unknown, missing or repeated column, a
            value that is not a finite number of the right sign, and a repeated row.
    """
    path = Path(path)
    points: list[Point] = []
    seen: dict[tuple[object, ...], int] = {}
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.reader(file, strict=True)
            columns = _columns(next(rows, []), path)
            for cells in rows:
                if not any(cell.strip() for cell in cells):
                    continue
                line = rows.line_num
                point = _parse(columns, cells, f"{path}:{line}")
                if "run" not in columns:
                    point = replace(point, run=f"row {len(points) + 1}")
                key = _identity(point, columns)
                if key in seen:
                    raise UserError(
                        f"{path}:{line}: {', '.join(_key_fields(columns))}: the same as on line "
                        f"{seen[key]}; keep one of the two rows"
                    )
                seen[key] = line
                points.append(point)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"points={str(path)!r}: cannot be read as UTF-8 CSV ({error})") from error
    if not points:
        raise UserError(f"points={str(path)!r}: has no row; give one row for each measurement")
    return points


def _columns(header: Sequence[str], path: Path) -> list[str]:
    columns = [name.strip() for name in header]
    problems = [
        f"{name!r} is not a column of points.csv" for name in columns if name not in COLUMNS
    ]
    problems += [f"{name!r} is missing" for name in REQUIRED if name not in columns]
    problems += [f"{name!r} is there twice" for name in set(columns) if columns.count(name) > 1]
    if problems:
        raise UserError(
            f"{path}:1: {'; '.join(sorted(problems))}; the first line must name "
            f"{','.join(REQUIRED)} and may name {','.join(COLUMNS[len(REQUIRED) :])}"
        )
    return columns


def _parse(columns: Sequence[str], cells: Sequence[str], where: str) -> Point:
    if len(cells) != len(columns):
        raise UserError(
            f"{where}: has {len(cells)} fields where the first line names {len(columns)}; "
            "quote a field that holds a comma"
        )
    values: dict[str, object] = {}
    for column, cell in zip(columns, cells, strict=True):
        text = cell.strip()
        if column in TEXT_COLUMNS:
            if not text:
                raise UserError(f"{where}: {column} is empty; give a name")
            values[column] = plain_text(text)
        elif text or column not in MAY_BE_EMPTY:
            values[column] = _parse_number(column, text, where)
    return Point(**values)  # type: ignore[arg-type]


def _parse_number(column: str, text: str, where: str) -> float:
    # float() alone would also take 1_000, nan and infinity.
    number = float(text) if _NUMBER.fullmatch(text) else math.nan
    if not math.isfinite(number):
        raise UserError(f"{where}: {column}={text!r}: not a number; give one such as 1.5e9")
    if number < 0 or (number == 0 and column in ("params", "loss")):
        raise UserError(
            f"{where}: {column}={text!r}: must be above zero; correct or remove the row"
        )
    return number


def _key_fields(columns: Sequence[str]) -> list[str]:
    if "run" not in columns:
        return [column for column in columns if column in REQUIRED]
    last = "step" if "step" in columns else "flops"
    return ["arch", "run", *(["eval_set"] if "eval_set" in columns else []), last]


def _identity(point: Point, columns: Sequence[str]) -> tuple[object, ...]:
    return tuple(getattr(point, field) for field in _key_fields(columns))


def by_arch(points: Iterable[Point]) -> dict[str, list[Point]]:
    """Points by architecture, architectures by name."""
    groups: dict[str, list[Point]] = {}
    for point in points:
        groups.setdefault(point.arch, []).append(point)
    return {arch: groups[arch] for arch in sorted(groups)}


def by_run(points: Iterable[Point]) -> dict[tuple[str, str], list[Point]]:
    """Points by run, each run's by FLOPs: its learning curve."""
    groups: dict[tuple[str, str], list[Point]] = {}
    for point in points:
        groups.setdefault(point.run_key, []).append(point)
    return {
        key: sorted(group, key=lambda p: (p.flops, p.step or 0)) for key, group in groups.items()
    }


def final_points(points: Iterable[Point]) -> list[Point]:
    """The last point of each run."""
    return [curve[-1] for curve in by_run(points).values()]


def select_eval_set(points: Sequence[Point], eval_set: str) -> list[Point]:
    """The points measured on `eval_set`; all of them when the table has no such column.

    Raises UserError when there is none, naming the sets there are.
    """
    chosen = [point for point in points if point.eval_set in (None, eval_set)]
    if not chosen:
        known = sorted({str(point.eval_set) for point in points})
        raise UserError(
            f"eval_set={eval_set!r}: nothing was measured on it; give one of: {', '.join(known)}"
        )
    return chosen


def with_params_convention(points: Sequence[Point], convention: str) -> list[Point]:
    """The points with `params` by `convention` for the fits, where the table can say both.

    Raises UserError when a table of ours lacks `params_non_embedding`.
    """
    if convention != "non_embedding" or all(p.params_non_embedding is None for p in points):
        return list(points)
    chosen = []
    for point in points:
        if not point.params_non_embedding:
            raise UserError(
                f"params_non_embedding={point.params_non_embedding!r} of run {point.run!r}: must "
                "be above zero for --params_convention non_embedding; give it, or use total"
            )
        chosen.append(replace(point, params=point.params_non_embedding))
    return chosen

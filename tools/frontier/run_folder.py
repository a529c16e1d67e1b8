"""One run folder as the frontier sees it: what was trained, and every loss that was measured.

A folder is read strictly: what is not what the format says is refused with its file, line and
field. Two things are forgiven, because an interrupted machine leaves them behind: a last line cut
short, and lines of a step that a later attempt trained again (the last attempt wins).
"""

from __future__ import annotations

import json
import math
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.options import UserError
from pipeline.run_folder import RunFolder

FORMAT = 1
STAGES = ("pretrain", "finetune")
DIRECTION_MARKS = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
FLOP_CONVENTIONS = ("flops_6n", "flops_model_causal", "flops_model_full", "flops_hardware")


@dataclass(frozen=True)
class Evaluation:
    """One held-out measurement; counts are cumulative over training up to it."""

    step: int
    attempt: int
    eval_set: str
    loss: float  # nats per matched target token
    eval_tokens: int  # target tokens the loss is a mean over
    bits_per_byte: float | None
    unigram_entropy: float | None  # nats, empirical, of exactly those target tokens
    processed_tokens: int
    loss_tokens: int
    flops_6n: float
    flops_model_causal: float
    flops_model_full: float
    flops_hardware: float
    final: bool


@dataclass(frozen=True)
class TrainingLoss:
    """The training loss of one step."""

    step: int
    processed_tokens: int
    loss: float  # nats per target token


@dataclass(frozen=True)
class Run:
    """A run folder, read and checked."""

    name: str
    folder: str  # relative to the folder that was searched
    arch: str
    size: str
    stage: str  # "pretrain" or "finetune"
    seed: int
    params: int  # total, tied weights once
    params_non_embedding: int
    finished: bool
    evaluations: tuple[Evaluation, ...]  # by step, then eval set; the last attempt of each
    training: tuple[TrainingLoss, ...]  # by step; the last attempt of each; finite losses only
    parent: str  # what a finetune run started from, or ""
    data_fingerprint: str
    tokenizer_sha256: str
    versions: tuple[tuple[str, str], ...]
    cut_lines: int  # last lines cut short by an interruption, and left out
    superseded: int  # evaluations of a discarded attempt, left out
    diverged: str  # where a loss was not finite, or ""


def is_run_folder(folder: Path) -> bool:
    """Whether `folder` holds a run that has been evaluated at least once."""
    return (folder / "config.json").is_file() and (folder / "eval.jsonl").is_file()


def read_run(folder: Path, relative: str) -> Run:
    """The run in `folder`.

    Raises:
        UserError: naming the file, the line, the field and the remedy.
    """
    config = _read_config(folder / "config.json")
    where = folder / "config.json"
    settings, parameters = _mapping(config, "run", where), _mapping(config, "parameters", where)
    data = _mapping(config, "data", where)
    versions = config.get("versions", {})
    attempts: dict[int, int] = {}
    training, cut_metrics = _read_training(folder / "metrics.jsonl", attempts)
    evaluations, cut_evaluations, superseded = _read_evaluations(folder / "eval.jsonl", attempts)
    is_finished = (folder / "FINISHED").exists()
    if is_finished and (end := _end(folder)) is not None:
        # A rollback left batches out, and the data ended before all that it took back was remade.
        training = [each for each in training if each.step <= end]
        kept = [each for each in evaluations if each.step <= end]
        superseded += len(evaluations) - len(kept)
        evaluations = kept
    bad = [e for e in evaluations if not math.isfinite(e.loss)]
    return Run(
        name=plain_text(settings.get("name") or relative),
        folder=plain_text(relative),
        arch=_text(settings, "arch", where),
        size=plain_text(settings.get("size") or ""),
        stage=str(config["stage"]),
        seed=int(_number(settings, "seed", str(where), whole=True)),
        params=int(_number(parameters, "total", str(where), whole=True, positive=True)),
        params_non_embedding=int(_number(parameters, "non_embedding", str(where), whole=True)),
        finished=is_finished,
        evaluations=tuple(evaluations),
        training=tuple(training),
        parent=_parent(config.get("parent")),
        data_fingerprint=plain_text(data.get("fingerprint") or ""),
        tokenizer_sha256=plain_text(data.get("tokenizer_sha256") or ""),
        versions=tuple(sorted((plain_text(k), plain_text(v)) for k, v in dict(versions).items())),
        cut_lines=cut_metrics + cut_evaluations,
        superseded=superseded,
        diverged=f"step {bad[0].step} on {bad[0].eval_set}" if bad else "",
    )


def _end(folder: Path) -> int | None:
    """The step that a finished run ended with, where that is before its last; else None."""
    try:
        step = RunFolder(folder).finished_step(-1)
    except (ValueError, KeyError, TypeError, OSError) as error:
        file = folder / "FINISHED"
        raise UserError(f"{file}: cannot be read ({error}); restore it") from error
    return None if step < 0 else step


def plain_text(value: object) -> str:
    """`value` as text that any terminal, CSV or page may show.

    Control characters and marks that turn the reading direction (a terminal would obey both) and
    halves of surrogate pairs (UTF-8 cannot hold them) become U+FFFD.
    """
    return "".join(
        "\ufffd" if unicodedata.category(c) in ("Cc", "Cs") or c in DIRECTION_MARKS else c
        for c in str(value)
    )


def _parent(value: object) -> str:
    """The name of the run folder that `value`, a path to it or to a checkpoint in it, is in."""
    parts = [part for part in str(value or "").split("/") if part]
    if "checkpoints" in parts[1:]:
        parts = parts[: parts.index("checkpoints", 1)]
    return plain_text(parts[-1]) if parts else ""


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(
            f"{path}: cannot be read ({error}); restore the file or move its folder away"
        ) from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        found = config.get("format") if isinstance(config, dict) else type(config).__name__
        raise UserError(
            f"{path}: format={found!r}: this version reads format {FORMAT}; "
            "move the folder away, or use the isoflop version that wrote it"
        )
    if config.get("stage") not in STAGES:
        raise UserError(
            f"{path}: stage={config.get('stage')!r}: unknown; one of {', '.join(STAGES)} is meant"
        )
    return config


def _read_training(path: Path, attempts: dict[int, int]) -> tuple[list[TrainingLoss], int]:
    """Training losses by step, and the number of cut lines; fills `attempts` (step → last)."""
    if not path.exists():
        return [], 0
    last: dict[int, TrainingLoss] = {}
    cut = _Cut()
    for number, row in read_lines(path, cut):
        where = f"{path}:{number}"
        step = int(_number(row, "step", where, whole=True))
        attempt = int(_number(row, "attempt", where, whole=True))
        if attempt < attempts.get(step, attempt):
            continue
        attempts[step] = attempt
        tokens = int(_number(row, "processed_tokens", where, whole=True))
        last[step] = TrainingLoss(step, tokens, _loss(row, where))
    return [last[s] for s in sorted(last) if math.isfinite(last[s].loss)], cut.lines


def _read_evaluations(path: Path, attempts: Mapping[int, int]) -> tuple[list[Evaluation], int, int]:
    """Evaluations of the last attempt of each step, cut lines, and evaluations left out."""
    last: dict[tuple[int, str], Evaluation] = {}
    cut, seen = _Cut(), 0
    for number, row in read_lines(path, cut):
        seen += 1
        found = _evaluation(row, f"{path}:{number}")
        key = (found.step, found.eval_set)
        # A later attempt that trained this step again discarded what was measured on the first.
        if found.attempt < attempts.get(found.step, found.attempt):
            continue
        if key not in last or last[key].attempt <= found.attempt:
            last[key] = found
    return [last[key] for key in sorted(last)], cut.lines, seen - len(last)


def _evaluation(row: Mapping[str, Any], where: str) -> Evaluation:
    def whole(field: str) -> int:
        return int(_number(row, field, where, whole=True))

    return Evaluation(
        step=whole("step"),
        attempt=whole("attempt"),
        eval_set=_text(row, "eval_set", where),
        loss=_loss(row, where),
        eval_tokens=whole("eval_tokens"),
        bits_per_byte=_optional(row, "bits_per_byte", where),
        unigram_entropy=_optional(row, "unigram_entropy", where),
        processed_tokens=whole("processed_tokens"),
        loss_tokens=whole("loss_tokens"),
        **{field: _number(row, field, where) for field in FLOP_CONVENTIONS},
        final=bool(row.get("final", False)),
    )


@dataclass
class _Cut:
    """How many last lines were cut short."""

    lines: int = 0


def read_lines(path: Path, cut: _Cut) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of each line of a .jsonl file.

    A last line without its newline that is no complete object is counted in `cut` and left out.
    Raises UserError for anything else that is not an object.
    """
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line.decode("utf-8"))
                if not isinstance(row, dict):
                    raise ValueError(f"holds {type(row).__name__}, not an object")
            except ValueError as error:
                if not line.endswith(b"\n"):  # only the last line can lack it
                    cut.lines += 1
                    return
                raise UserError(
                    f"{path}:{number}: not a JSON object ({error}); repair or remove the line"
                ) from error
            yield number, row


def _mapping(config: Mapping[str, Any], field: str, where: Path) -> Mapping[str, Any]:
    value = config.get(field)
    if not isinstance(value, Mapping):
        raise UserError(f"{where}: {field}={value!r}: not a mapping; restore the file")
    return value


def _text(row: Mapping[str, Any], field: str, where: object) -> str:
    value = row.get(field)
    if not isinstance(value, str) or not value:
        raise UserError(f"{where}: {field}={value!r}: not text; repair or remove the line")
    return plain_text(value)


def _number(
    row: Mapping[str, Any], field: str, where: str, *, whole: bool = False, positive: bool = False
) -> float:
    value = row.get(field)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        problem = "missing" if field not in row else "not a finite number"
    elif value < 0 or (positive and value == 0):
        problem = "too small"
    elif whole and value != int(value):
        problem = "not a whole number"
    else:
        return value
    raise UserError(f"{where}: {field}={value!r}: {problem}; repair or remove the line")


def _optional(row: Mapping[str, Any], field: str, where: str) -> float | None:
    return None if row.get(field) is None else _number(row, field, where)


def _loss(row: Mapping[str, Any], where: str) -> float:
    """A loss; one that is not finite is a fact about the run (it diverged), not a broken file."""
    value = row.get("loss", "missing")
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return math.nan
    return _number(row, "loss", where)

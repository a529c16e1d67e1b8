"""`isoflop frontier`: runs or a table to points.csv, fit.json, frontier.png and report.html."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipeline.options import UserError, option
from tools.frontier import points as tables
from tools.frontier.points import Point
from tools.frontier.run_folder import Run


@dataclass(frozen=True)
class Options:
    """From finished runs (or a table of points) to the compute-optimal frontier.

    Writes points.csv (and finetune.csv where runs were finetuned), fit.json, frontier.png and a
    self-contained report.html into OUTPUT. The observed envelope is always drawn; a fit only where
    the runs support one, else it is refused with the reason.
    """

    output: str = option("folder to write into; made if absent", metavar="DIR")
    runs: str | None = option("folder searched for run folders, at any depth", None, metavar="DIR")
    points: str | None = option(
        "table with arch,params,tokens,flops,loss and any other column of points.csv",
        None,
        metavar="CSV",
    )
    params_convention: Literal["total", "non_embedding", "unknown"] | None = option(
        "what N is in the fits; for a foreign table, what its params are (default: total for "
        "runs and tables of ours, unknown for foreign ones)",
        None,
    )
    eval_set: str = option("evaluation set whose loss makes the frontier", "validation")
    include_unfinished: bool = option("also take runs that have not FINISHED", False)
    bootstrap: int = option("resamples of the runs behind the intervals", 400, minimum=10)
    seed: int = option("seed of the resampling", 0, minimum=0)
    json: bool = option("print fit.json on stdout, and all else on stderr", False)

    def problems(self) -> Iterable[str]:
        """What single fields cannot say."""
        if (self.runs is None) == (self.points is None):
            yield "runs, points: give exactly one of --runs DIR and --points CSV"
        if self.runs is not None and not Path(self.runs).is_dir():
            yield f"runs={self.runs!r}: no such folder; give one that holds run folders"
        if self.points is not None and not Path(self.points).is_file():
            yield f"points={self.points!r}: no such file; give a CSV"
        if Path(self.output).exists() and not Path(self.output).is_dir():
            yield f"output={self.output!r}: is a file; give a folder"


@dataclass(frozen=True)
class Source:
    """What a frontier is made from."""

    points: list[Point]  # of pretraining, every evaluation set
    convention: str  # of N
    runs: tuple[Run, ...] = ()  # all that were taken; none when a table was read
    warnings: tuple[str, ...] = ()


def run(options: Options) -> None:
    """Read, fit, draw and write. Raises UserError before anything is written."""
    source = _from_table(options) if options.points else _from_runs(options)
    chosen = tables.select_eval_set(source.points, options.eval_set)
    fitted = tables.with_params_convention(chosen, source.convention)
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    for warning in source.warnings:
        print(f"warning: {warning}", file=sys.stderr)

    _keep_to_one_thread()
    from tools.frontier import figure, fits, report
    from tools.frontier.fitting import Bootstrap
    from tools.frontier.summary import final_rows, rows_of, text_table

    fit = fits.fit_all(
        fitted,
        params_convention=source.convention,
        eval_set=options.eval_set,
        bootstrap=Bootstrap(options.bootstrap, options.seed),
        progress=lambda text: print(text, file=sys.stderr, flush=True),
    )
    written = [output / "points.csv"]
    tables.write_points(source.points, written[0])
    finetuned = tables.points_of(run for run in source.runs if run.stage == "finetune")
    if finetuned:
        written.append(output / "finetune.csv")
        tables.write_points(finetuned, written[-1])
    rows = final_rows(source.runs, options.eval_set) if source.runs else rows_of(chosen)
    text = json.dumps(fit, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    _write(output / "fit.json", text)
    figure.draw(chosen, fit, output / "frontier.png")
    page = report.render(
        report.Content(
            points=chosen,
            rows=rows,
            runs=source.runs,
            fit=fit,
            warnings=source.warnings,
            source=options.points or options.runs or "",
        )
    )
    _write(output / "report.html", page)
    written += [output / name for name in ("fit.json", "frontier.png", "report.html")]
    said = sys.stderr if options.json else sys.stdout
    for path in written:
        print(f"wrote {path}", file=said)
    print("\n" + text_table(rows), file=said)
    if options.json:
        print(text, end="")


def _keep_to_one_thread() -> None:
    """Thousands of tiny solves: a second BLAS thread only waits, and makes it twice as slow."""
    if "numpy" not in sys.modules:  # later it is not read
        for library in ("OPENBLAS", "OMP", "MKL"):
            os.environ.setdefault(f"{library}_NUM_THREADS", "1")


def _from_runs(options: Options) -> Source:
    """Raises UserError when no run can be taken."""
    found = tables.read_runs(str(options.runs))
    taken, warnings = select(found, include_unfinished=options.include_unfinished)
    pretrained = [run for run in taken if run.stage == "pretrain"]
    if not pretrained:
        why = "; ".join(warnings) or "all were finetuned"
        raise UserError(
            f"runs={options.runs!r}: no pretraining run can be taken ({why}); finish one, or give "
            "--include_unfinished true"
        )
    if options.params_convention == "unknown":
        raise UserError("params_convention='unknown': runs say both; give total or non_embedding")
    warnings += not_comparable(pretrained, options.eval_set)
    return Source(
        points=tables.points_of(pretrained),
        convention=options.params_convention or "total",
        runs=tuple(taken),
        warnings=tuple(warnings),
    )


def _from_table(options: Options) -> Source:
    points = tables.read_points(str(options.points))
    ours = all(point.params_non_embedding is not None for point in points)
    return Source(points, options.params_convention or ("total" if ours else "unknown"))


def select(runs: Iterable[Run], *, include_unfinished: bool) -> tuple[list[Run], list[str]]:
    """The runs a frontier may be made from, and a warning for each that needs one."""
    taken, warnings = [], []
    for run in runs:
        if run.diverged:
            warnings.append(f"run {run.name}: left out, its loss is not finite at {run.diverged}")
            continue
        if not run.finished and not include_unfinished:
            warnings.append(
                f"run {run.name}: left out, it has not finished "
                "(--include_unfinished true takes it)"
            )
            continue
        if not run.evaluations:
            warnings.append(f"run {run.name}: left out, it has no evaluation")
            continue
        if not run.finished:
            warnings.append(f"run {run.name}: has not finished; its last loss is not its final one")
        if run.cut_lines:
            warnings.append(f"run {run.name}: {run.cut_lines} last line(s) cut short, left out")
        taken.append(run)
    return taken, warnings


def not_comparable(runs: Iterable[Run], eval_set: str) -> list[str]:
    """A warning when the losses of `eval_set` are not over the same target tokens."""
    groups: dict[tuple[object, ...], list[str]] = {}
    for run in runs:
        measured = [e for e in run.evaluations if e.eval_set == eval_set]
        if measured:
            last = measured[-1]
            entropy = None if last.unigram_entropy is None else round(last.unigram_entropy, 4)
            key = (run.tokenizer_sha256, run.data_fingerprint, last.eval_tokens, entropy)
            groups.setdefault(key, []).append(run.name)
    if len(groups) <= 1:
        return []
    listed = "; ".join(
        f"{key[2]} tokens, entropy {key[3]}, data {str(key[1])[:12]}: {', '.join(names)}"
        for key, names in groups.items()
    )
    return [f"losses on {eval_set} are not over the same target tokens ({listed})"]


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".partial")
    temporary.write_text(text, encoding="utf-8", newline="\n")
    os.replace(temporary, path)

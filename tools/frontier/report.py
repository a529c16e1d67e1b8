"""report.html: one file that opens from disk, needs no network and trusts no text from runs.

The page's frame, looks and behaviour are report.html, report.css and report.js beside this module;
what varies is put in here, escaped by `tools.frontier.markup`. Its Content-Security-Policy allows
exactly these two inline texts, by hash: were some text to slip through unescaped, no browser would
run it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from string import Template
from typing import Any

from tools.frontier import charts, report_text
from tools.frontier.markup import escape, isolated, script_json, source_hash, table
from tools.frontier.points import Point
from tools.frontier.run_folder import Run
from tools.frontier.styles import PALETTE, Style, styles
from tools.frontier.summary import FinalRow

COUNT, DECIMALS = "{:,.0f}", "{:.4f}"


@dataclass(frozen=True)
class Content:
    """What a report shows."""

    points: Sequence[Point]  # of pretraining, on one evaluation set
    rows: Sequence[FinalRow]
    runs: Sequence[Run]  # none when a table was read
    fit: Mapping[str, Any]  # the content of fit.json
    warnings: Sequence[str]
    source: str  # the folder or table it was made from


def render(content: Content) -> str:
    """The page."""
    looks = styles([p.arch for p in content.points] + [run.arch for run in content.runs])
    style = Template(_template("report.css")).substitute(
        light=_colours("light"),
        dark=_colours("dark"),
        looks="\n".join(f".c{s.index} {{ --c: var(--look{s.index}); }}" for s in PALETTE),
    )
    script = _template("report.js")
    fitted = any(
        "refused" not in found["approach3"] for found in content.fit["architectures"].values()
    )
    return Template(_template("report.html")).substitute(
        policy="default-src 'none'; base-uri 'none'; form-action 'none'; "
        f"style-src {source_hash(style)}; script-src {source_hash(script)}",
        style=style,
        script=script,
        lead=report_text.lead(content.points, str(content.fit["eval_set"]), content.source),
        warnings=_warnings(content.warnings),
        legend=_legend({a: looks[a] for a in looks if a in content.fit["architectures"]}),
        frontier=charts.frontier_chart(content.points, looks, content.fit),
        frontier_note=escape(report_text.frontier_note(fitted)),
        results=_results(content.rows),
        fits=report_text.fits(content.fit),
        learning=_learning(content.runs, looks, str(content.fit["eval_set"])),
        finetuning=_finetuning(content.runs),
        conventions=report_text.conventions(content.fit),
        provenance=report_text.provenance(content.runs),
        fit_json=script_json(content.fit),
    )


def _template(name: str) -> str:
    return resources.files("tools.frontier").joinpath(name).read_text(encoding="utf-8")


def _colours(scheme: str) -> str:
    return "".join(f"  --look{s.index}: {getattr(s, scheme)};\n" for s in PALETTE)


def _warnings(warnings: Sequence[str]) -> str:
    if not warnings:
        return ""
    items = "".join(f"<li>{isolated(text)}</li>" for text in warnings)
    return f'<ul class="warnings" aria-label="Warnings">{items}</ul>'


def _legend(looks: Mapping[str, Style]) -> str:
    items = "".join(
        f"<li>{charts.key_mark(look)}{isolated(arch)}</li>" for arch, look in looks.items()
    )
    return f'<ul class="legend" aria-label="Architectures">{items}</ul>'


def _results(rows: Sequence[FinalRow]) -> str:
    return table(
        "Each run at its last evaluation",
        (
            "Architecture",
            "Run",
            "Parameters",
            "Non-embedding",
            "Tokens",
            "FLOPs",
            "Held-out loss",
            "Bits per byte",
            "Unigram entropy",
            "Margin",
        ),
        [
            (
                isolated(row.arch),
                isolated(row.run) + (" (finetuned)" if row.stage == "finetune" else ""),
                _number(row.params, COUNT),
                _number(row.params_non_embedding, COUNT),
                _number(row.tokens, COUNT),
                _number(row.flops, "{:.4g}"),
                _number(row.loss, DECIMALS),
                _number(row.bits_per_byte, DECIMALS),
                _number(row.unigram_entropy, DECIMALS),
                _number(row.margin, DECIMALS),
            )
            for row in rows
        ],
        texts=2,
    )


def _number(value: float | None, form: str) -> str:
    return "—" if value is None else escape(form.format(value))


def _learning(runs: Sequence[Run], looks: Mapping[str, Style], eval_set: str) -> str:
    if not runs:
        return ""
    limits = charts.learning_limits(runs)
    figures = [
        f"<figure><figcaption>{charts.key_mark(looks[run.arch])} {isolated(run.arch)} · "
        f"{isolated(run.name)}</figcaption>"
        f"{charts.learning_chart(run, looks[run.arch], limits, number, eval_set)}</figure>"
        for number, run in enumerate(runs)
    ]
    return (
        '<section aria-labelledby="learning"><h2 id="learning">Learning curves</h2>'
        f'<div class="runs">{"".join(figures)}</div>'
        f'<p class="note">{escape(report_text.LEARNING_NOTE)}</p></section>'
    )


def _finetuning(runs: Sequence[Run]) -> str:
    """What finetuning changed, on every set that was measured before and after it."""
    rows = []
    for run in runs:
        if run.stage != "finetune":
            continue
        for eval_set in sorted({e.eval_set for e in run.evaluations}):
            line = [e for e in run.evaluations if e.eval_set == eval_set]
            before, after = line[0], line[-1]
            rows.append(
                (
                    isolated(run.arch),
                    isolated(run.name),
                    isolated(run.parent or "—"),
                    isolated(eval_set),
                    _number(before.step, COUNT),
                    _number(after.step, COUNT),
                    _number(before.loss, DECIMALS),
                    _number(after.loss, DECIMALS),
                    _number(after.loss - before.loss, "{:+.4f}"),
                    _number(after.unigram_entropy, DECIMALS),
                )
            )
    if not rows:
        return ""
    headers = (
        *("Architecture", "Run", "Started from", "Evaluation set", "First step", "Last step"),
        *("Loss before", "Loss after", "Change", "Unigram entropy"),
    )
    caption = "Held-out loss at the first and at the last evaluation of each finetuning run"
    return (
        '<section aria-labelledby="finetuning"><h2 id="finetuning">Finetuning</h2>'
        + table(caption, headers, rows, texts=4)
        + "</section>"
    )

"""The report's charts, as SVG that needs nothing else.

Each is drawn twice, wide and narrow, and the style sheet shows the one that fits: text keeps its
size on a telephone. Marks carry their text in a <title>, which any browser shows, and which the
page's script turns into a tooltip for pointer and keyboard.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from tools.frontier import plot
from tools.frontier.axes import decimal_ticks, fit_curve, num, power, power_ticks, short_count
from tools.frontier.envelope import envelope
from tools.frontier.points import Point, by_arch, final_points
from tools.frontier.run_folder import Evaluation, Run
from tools.frontier.styles import Style

MOST_MARKS = 1500  # intermediate evaluations beyond this are thinned: each can be reached by key
MOST_STEPS = 160  # a run's training loss is averaged into this many bins


def frontier_chart(
    points: Sequence[Point], looks: Mapping[str, Style], fit: Mapping[str, Any]
) -> str:
    """Held-out loss over training FLOPs, wide and narrow."""
    shown = [p for p in points if p.flops > 0 and p.loss > 0]
    curves = {
        arch: fit_curve(fit["architectures"][arch]["approach3"])
        for arch in looks
        if "refused" not in fit["architectures"][arch]["approach3"]
    }
    return "".join(
        f'<div class="chart {name}">{_frontier(shown, looks, curves, name, size)}</div>'
        for name, size in (("wide", (920, 500)), ("narrow", (336, 380)))
    )


def _frontier(
    points: Sequence[Point],
    looks: Mapping[str, Style],
    curves: Mapping[str, list[tuple[list[float], list[float], bool]]],
    name: str,
    size: tuple[int, int],
) -> str:
    fitted = [part for parts in curves.values() for part in parts]
    frame = plot.Frame(
        *size,
        x=plot.padded([p.flops for p in points] + [x for xs, _, _ in fitted for x in xs], 1.15),
        y=plot.padded([p.loss for p in points] + [y for _, ys, _ in fitted for y in ys], 1.02),
        log=True,
    )
    finals = {id(p) for p in final_points(points)}
    best = envelope(points)
    on_envelope = {id(p) for p in best}
    layers = [
        plot.axes(
            frame,
            [(x, power(x)) for x in power_ticks(*frame.x, 9 if name == "wide" else 5)],
            [(y, num(y)) for y in decimal_ticks(*frame.y, 8)],
            ("training FLOPs", "held-out loss, nats per token"),
        ),
        plot.polyline(frame, [(p.flops, p.loss) for p in best], "overall"),
    ]
    for arch, group in by_arch(points).items():
        line = [(p.flops, p.loss) for p in envelope(group)]
        layers.append(plot.polyline(frame, line, f"envelope c{looks[arch].index}"))
    for arch, parts in curves.items():
        for xs, ys, beyond in parts:
            kind = "beyond" if beyond else "fit"
            line = list(zip(xs, ys, strict=True))
            layers.append(plot.polyline(frame, line, f"{kind} c{looks[arch].index}"))
    for point in _thinned(points, finals | on_envelope):
        final = id(point) in finals
        layers.append(
            plot.mark(
                frame.across(point.flops),
                frame.down(point.loss),
                looks[point.arch],
                5.6 if final else 3.4,
                "final" if final else "passing",
                describe(point, final=final, best=id(point) in on_envelope),
            )
        )
    return plot.svg(
        frame,
        f"frontier-{name}",
        "Compute frontier",
        f"Held-out loss over training FLOPs, both logarithmic, for {len(points)} evaluations of "
        f"{', '.join(looks)}; {len(best)} are on the overall envelope. "
        "Arrow keys move between points.",
        layers,
    )


def describe(point: Point, *, final: bool, best: bool) -> str:
    """What a point is, a fact a line."""
    lines = [f"{point.arch} · {point.run}"]
    if point.step is not None:
        lines.append(f"step {point.step:,.0f}" + (" (final)" if final else ""))
    params = f"parameters {point.params:,.0f}"
    if point.params_non_embedding is not None:
        params += f" ({point.params_non_embedding:,.0f} non-embedding)"
    lines += [
        params,
        f"tokens {point.tokens:,.0f}",
        f"FLOPs {point.flops:.4g}",
        f"held-out loss {point.loss:.4f} nats",
    ]
    if point.bits_per_byte is not None:
        lines.append(f"bits per byte {point.bits_per_byte:.4f}")
    if best:
        lines.append("on the overall envelope")
    return "\n".join(lines)


def _thinned(points: Sequence[Point], keep: set[int]) -> list[Point]:
    """All of `keep`, and what can be shown of the rest; by FLOPs, so that keys go rightwards."""
    rest = [p for p in points if id(p) not in keep]
    every = max(1, math.ceil(len(rest) / MOST_MARKS))
    chosen = keep | {id(p) for p in rest[::every]}
    return sorted((p for p in points if id(p) in chosen), key=lambda p: (p.flops, p.loss))


def learning_chart(
    run: Run, look: Style, limits: tuple[float, float], number: int, eval_set: str
) -> str:
    """Training and held-out loss of one run over processed tokens; `limits` of the loss.

    `eval_set` is drawn solid, others dashed; `number` makes the chart's names unique.
    """
    frame = plot.Frame(336, 200, x=_token_range(run), y=limits, log=False, bottom=38)
    training = [(t[0], t[1]) for t in binned([(t.processed_tokens, t.loss) for t in run.training])]
    layers = [
        plot.axes(
            frame,
            [(x, short_count(x)) for x in decimal_ticks(*frame.x, 4)],
            [(y, num(y)) for y in decimal_ticks(*frame.y, 5)],
            ("processed tokens", "nats per token"),
        ),
        plot.polyline(frame, training, "training"),
    ]
    names = sorted({e.eval_set for e in run.evaluations}, key=lambda n: (n != eval_set, n))
    for number_of_set, name in enumerate(names):
        line = [e for e in run.evaluations if e.eval_set == name]
        kind = "envelope" if number_of_set == 0 else "other"
        layers.append(
            plot.polyline(
                frame, [(e.processed_tokens, e.loss) for e in line], f"{kind} c{look.index}"
            )
        )
        layers += [
            plot.mark(
                frame.across(e.processed_tokens),
                frame.down(e.loss),
                look,
                4.2,
                "final",
                _describe_evaluation(run, e),
            )
            for e in line
        ]
    return plot.svg(
        frame,
        f"run-{number}",
        f"Loss of {run.name}",
        f"Training loss and held-out loss of {run.arch} run {run.name} over processed tokens.",
        layers,
    )


def _token_range(run: Run) -> tuple[float, float]:
    tokens = [e.processed_tokens for e in run.evaluations]
    tokens += [t.processed_tokens for t in run.training]
    first, last = min(tokens), max(*tokens, 1)
    # A finetuning run counts from its parent's tokens: its axis starts there.
    return (first, last) if last / 2 < first < last else (0, last)


def _describe_evaluation(run: Run, evaluation: Evaluation) -> str:
    return (
        f"{run.arch} · {run.name}\nstep {evaluation.step:,} on {evaluation.eval_set}\n"
        f"tokens {evaluation.processed_tokens:,}\nheld-out loss {evaluation.loss:.4f} nats"
    )


def learning_limits(runs: Sequence[Run]) -> tuple[float, float]:
    """The range of all losses, so that the charts of all runs compare."""
    losses = [e.loss for run in runs for e in run.evaluations]
    for run in runs:
        losses += [y for _, y in binned([(t.processed_tokens, t.loss) for t in run.training])]
    low, high = min(losses), max(losses)
    room = 0.05 * (high - low or 1.0)
    return low - room, high + room


def binned(series: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most MOST_STEPS points, each the mean of neighbours."""
    every = max(1, math.ceil(len(series) / MOST_STEPS))
    bins = [series[i : i + every] for i in range(0, len(series), every)]
    return [(sum(x for x, _ in b) / len(b), sum(y for _, y in b) / len(b)) for b in bins]


def key_mark(look: Style) -> str:
    """The marker of an architecture, for the legend."""
    return (
        '<svg class="key" width="16" height="16" viewBox="-8 -8 16 16" aria-hidden="true">'
        f'<g class="c{look.index}">{plot.outline(look, 5.6)}</g></svg>'
    )

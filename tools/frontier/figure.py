"""frontier.png: loss over FLOPs, with the observed envelope, and a fit where one is allowed."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tools.frontier.axes import decimal_ticks, fit_curve, num
from tools.frontier.envelope import envelope
from tools.frontier.points import Point, by_arch, final_points
from tools.frontier.styles import styles


def draw(points: Sequence[Point], fit: Mapping[str, Any], path: Path) -> None:
    """Write the figure of `points` to `path`; the same input gives the same bytes."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    points = [p for p in points if p.flops > 0 and p.loss > 0]
    finals = {id(p) for p in final_points(points)}
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, "font.family": "DejaVu Sans"}):
        figure = Figure(figsize=(8, 5.2), dpi=160, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        axes.set_xscale("log")
        axes.set_yscale("log")
        handles: list[Any] = []
        labels: list[str] = []
        looks = styles(p.arch for p in points)
        groups = by_arch(points)
        for arch, look in looks.items():
            group = groups[arch]
            for chosen, size, alpha in (
                ([p for p in group if id(p) not in finals], 16, 0.45),
                ([p for p in group if id(p) in finals], 52, 1.0),
            ):
                drawn = axes.scatter(
                    [p.flops for p in chosen],
                    [p.loss for p in chosen],
                    s=size,
                    c=look.light,
                    marker=look.marker,
                    alpha=alpha,
                    linewidths=0,
                    zorder=3,
                )
            handles.append(drawn)
            labels.append(arch)
            _line(axes, envelope(group), color=look.light, lw=1.4, zorder=2)
            for flops, loss, beyond in _surfaces(fit, arch):
                line = axes.plot(
                    flops, loss, color=look.light, lw=1.6, ls=":" if beyond else "--", zorder=4
                )[0]
                handles.append(line)
                labels.append(f"{arch}: fit" + (", extrapolated" if beyond else ""))
        handles.append(_line(axes, envelope(points), color="#888888", lw=7, alpha=0.35, zorder=1))
        labels.append("observed envelope")
        axes.set_xlabel("training FLOPs (" + str(fit["conventions"]["C"]).split(":")[0] + ")")
        axes.set_ylabel("held-out loss")
        _loss_ticks(axes)
        axes.grid(True, which="major", color="#dddddd", lw=0.6)
        axes.set_axisbelow(True)
        legend = axes.legend(handles, [" " + label for label in labels], frameon=False)
        for text in [*legend.get_texts(), axes.xaxis.label, axes.yaxis.label]:
            text.set_parse_math(False)  # a "$" in a name is a "$"
        temporary = path.with_name(path.name + ".partial")
        figure.savefig(temporary, format="png", metadata={"Software": None})
    os.replace(temporary, path)


def _line(axes: Any, points: Sequence[Point], **look: Any) -> Any:
    return axes.plot([p.flops for p in points], [p.loss for p in points], **look)[0]


def _surfaces(fit: Mapping[str, Any], arch: str) -> list[tuple[list[float], list[float], bool]]:
    """(FLOPs, loss, whether extrapolated) of the fitted frontier, where it was not refused."""
    found = fit["architectures"][arch]["approach3"]
    return [] if "refused" in found else fit_curve(found)


def _loss_ticks(axes: Any) -> None:
    from matplotlib.ticker import FixedFormatter, FixedLocator, NullFormatter, NullLocator

    low, high = axes.get_ylim()
    ticks = decimal_ticks(low, high, 7)
    axes.yaxis.set_major_locator(FixedLocator(ticks))
    axes.yaxis.set_major_formatter(FixedFormatter([num(tick) for tick in ticks]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_formatter(NullFormatter())

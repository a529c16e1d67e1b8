"""The observed frontier: no fit, only what was measured.

A point is on the lower-left envelope when no other reached a loss as low for as few FLOPs.
"""

from __future__ import annotations

from collections.abc import Iterable

from tools.frontier.points import Point


def envelope(points: Iterable[Point]) -> list[Point]:
    """The Pareto frontier of (flops, loss), by rising FLOPs and strictly falling loss.

    Points that cost nothing (an evaluation before the first step) are no part of it.
    """
    frontier: list[Point] = []
    for point in sorted(points, key=lambda p: (p.flops, p.loss)):
        if point.flops > 0 and (not frontier or point.loss < frontier[-1].loss):
            frontier.append(point)
    return frontier

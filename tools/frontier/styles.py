"""One look for each architecture, the same in the figure and in the report.

Colours are told apart with any colour vision (after Okabe and Ito) and have a contrast of at least
3:1 on their background; each also has a marker shape of its own, so that none relies on colour.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

FIRST = ("decllm", "redllm", "entp", "ared")  # keep their look whichever are present


@dataclass(frozen=True)
class Style:
    """How an architecture is drawn."""

    index: int  # selects the colours of report.css
    light: str  # on white
    dark: str  # on near-black
    marker: str  # matplotlib's name
    outline: tuple[tuple[float, float], ...]  # polygon in units of the radius; () for a circle


SQUARE = ((-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88))
TRIANGLE = ((0.0, -1.15), (1.05, 0.75), (-1.05, 0.75))
DIAMOND = ((0.0, -1.25), (1.25, 0.0), (0.0, 1.25), (-1.25, 0.0))
DOWN = tuple((x, -y) for x, y in reversed(TRIANGLE))
PLUS = (
    *((-0.4, -1.1), (0.4, -1.1), (0.4, -0.4), (1.1, -0.4), (1.1, 0.4), (0.4, 0.4)),
    *((0.4, 1.1), (-0.4, 1.1), (-0.4, 0.4), (-1.1, 0.4), (-1.1, -0.4), (-0.4, -0.4)),
)

PALETTE = (
    Style(0, "#0067a8", "#5bb8f0", "o", ()),
    Style(1, "#c24a00", "#ff9350", "s", SQUARE),
    Style(2, "#007a5a", "#35d0a0", "^", TRIANGLE),
    Style(3, "#a23b7c", "#ee9fcb", "D", DIAMOND),
    Style(4, "#7a6200", "#e6cf3c", "v", DOWN),
    Style(5, "#4a4a4a", "#c8c8c8", "P", PLUS),
)


def styles(architectures: Iterable[str]) -> dict[str, Style]:
    """A style for each architecture; beyond six, looks repeat."""
    names = sorted(set(architectures))
    known = [name for name in FIRST if name in names]
    found = {name: PALETTE[FIRST.index(name)] for name in known}
    free = [style for style in PALETTE if style not in found.values()] or list(PALETTE)
    for position, name in enumerate(name for name in names if name not in found):
        found[name] = free[position % len(free)]
    return {name: found[name] for name in [*known, *(n for n in names if n not in known)]}

"""What a chart is put together from: a frame of scales, axes, lines and marks, as SVG text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tools.frontier.markup import escape
from tools.frontier.styles import Style


@dataclass(frozen=True)
class Frame:
    """Where data go in a picture: pixels and data ranges."""

    width: float
    height: float
    x: tuple[float, float]
    y: tuple[float, float]
    log: bool
    left: float = 48.0
    right: float = 14.0
    top: float = 12.0
    bottom: float = 44.0

    def across(self, value: float) -> float:
        """The pixel of a data x."""
        share = _share(value, self.x, self.log)
        return round(self.left + share * (self.width - self.left - self.right), 2)

    def down(self, value: float) -> float:
        """The pixel of a data y."""
        share = _share(value, self.y, self.log)
        return round(self.height - self.bottom - share * (self.height - self.top - self.bottom), 2)


def _share(value: float, ends: tuple[float, float], log: bool) -> float:
    low, high = ends
    if log:
        value, low, high = math.log(value), math.log(low), math.log(high)
    return (value - low) / (high - low)


def padded(values: Sequence[float], room: float) -> tuple[float, float]:
    """The range of `values` with a factor of `room` at both ends."""
    return (min(values) / room, max(values) * room) if values else (1.0, 10.0)


def axes(
    frame: Frame,
    x_ticks: Sequence[tuple[float, str]],
    y_ticks: Sequence[tuple[float, str]],
    names: tuple[str, str],
) -> str:
    """Grid lines with their labels, and the axes' names."""
    foot, end = frame.height - frame.bottom, frame.width - frame.right
    parts = ['<g class="axes" aria-hidden="true">']
    for value, label in x_ticks:
        x = frame.across(value)
        parts.append(f'<path d="M{x} {frame.top}V{foot}"/>')
        parts.append(f'<text x="{x}" y="{foot + 16}" text-anchor="middle">{escape(label)}</text>')
    for value, label in y_ticks:
        y = frame.down(value)
        parts.append(f'<path d="M{frame.left} {y}H{end}"/>')
        parts.append(
            f'<text x="{frame.left - 6}" y="{y + 4}" text-anchor="end">{escape(label)}</text>'
        )
    middle = (frame.left + end) / 2
    parts.append(
        f'<text class="name" x="{middle}" y="{frame.height - 6}" text-anchor="middle">'
        f"{escape(names[0])}</text>"
    )
    centre = (frame.top + foot) / 2
    parts.append(
        f'<text class="name" transform="translate(11 {centre}) rotate(-90)" text-anchor="middle">'
        f"{escape(names[1])}</text></g>"
    )
    return "".join(parts)


def polyline(frame: Frame, line: Sequence[tuple[float, float]], kind: str) -> str:
    """A line through `line`, of the style sheet's classes `kind`; nothing for a single point."""
    if len(line) < 2:
        return ""
    path = "L".join(f"{frame.across(x)} {frame.down(y)}" for x, y in line)
    return f'<path class="{kind}" d="M{path}"/>'


def mark(x: float, y: float, look: Style, radius: float, kind: str, text: str) -> str:
    """A marker that says `text` to pointer, keyboard and screen reader."""
    said = escape(text)
    return (
        f'<g class="mark {kind} c{look.index}" transform="translate({x} {y})" role="img" '
        f'aria-label="{said}" tabindex="-1"><title>{said}</title>'
        f'<circle class="reach" r="9"/>{outline(look, radius)}</g>'
    )


def outline(look: Style, radius: float) -> str:
    """The shape of an architecture's marker around the origin."""
    if not look.outline:
        return f'<circle r="{radius}"/>'
    corners = "L".join(f"{round(x * radius, 2)} {round(y * radius, 2)}" for x, y in look.outline)
    return f'<path d="M{corners}Z"/>'


def svg(frame: Frame, name: str, title: str, text: str, layers: Sequence[str]) -> str:
    """The picture of `layers`, with a title and a description; `name` is unique in the page."""
    return (
        f'<svg class="plot" viewBox="0 0 {frame.width:g} {frame.height:g}" role="group" '
        f'aria-labelledby="{name}-title" aria-describedby="{name}-text">'
        f'<title id="{name}-title">{escape(title)}</title>'
        f'<desc id="{name}-text">{escape(text)}</desc>' + "\n".join(layers) + "</svg>"
    )

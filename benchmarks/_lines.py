"""Line charts in SVG, by hand: panels side by side, a doubling axis across, labels beside the lines' ends."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

from myna.evaluate.chart import ticks

WIDTH, HEIGHT = 300, 220  # of a panel, in pixels
LEFT, RIGHT, TOP, BOTTOM = 54, 16, 34, 40  # what lies around its axes
COLOURS = ("#2563a8", "#b4552d", "#3d7a4a", "#7a4a8a")
STYLE = (
    "text{font:11px system-ui,sans-serif;fill:#333}.title{font-weight:600}.grid{stroke:#ddd}"
    ".line{fill:none;stroke-width:2}"
)


@dataclass(frozen=True)
class Line:
    """Points (x, y) in the order of x; x is above 0."""

    name: str
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Panel:
    """One pair of axes. Both are logarithmic where `log_y`, so that a straight line is a power; else y starts at 0."""

    title: str
    x_words: str
    lines: tuple[Line, ...]
    log_y: bool = False


def draw(panels: Sequence[Panel], num_columns: int) -> str:
    """A whole SVG file of the panels that have points, row by row."""
    shown = [panel for panel in panels if any(line.points for line in panel.lines)]
    num_rows = math.ceil(len(shown) / num_columns)
    size = f'width="{num_columns * WIDTH}" height="{num_rows * HEIGHT}"'
    box = f'viewBox="0 0 {num_columns * WIDTH} {num_rows * HEIGHT}"'
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" {size} {box}>', f"<style>{STYLE}</style>"]
    parts += ['<rect width="100%" height="100%" fill="#fff"/>']
    for number, panel in enumerate(shown):
        row, column = divmod(number, num_columns)
        parts += [f'<g transform="translate({column * WIDTH} {row * HEIGHT})">', *_panel(panel), "</g>"]
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(panel: Panel) -> list[str]:
    points = [point for line in panel.lines for point in line.points]
    xs, ys = sorted({x for x, _ in points}), [y for _, y in points]
    y_ticks = _powers(min(ys), max(ys)) if panel.log_y else ticks(0.0, max(ys))
    parts = [_text(LEFT, 18, panel.title, "title")]
    for value in y_ticks:
        y = _y(value, y_ticks, panel.log_y)
        parts += [f'<line class="grid" x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}"/>']
        parts += [_text(LEFT - 6, y + 4, f"{value:,g}", anchor="end")]
    parts += [_text(_x(x, xs), HEIGHT - BOTTOM + 16, f"{x:,g}", anchor="middle") for x in xs]
    parts += [_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, panel.x_words, anchor="middle")]
    for number, line in enumerate(panel.lines):
        places = [(_x(x, xs), _y(y, y_ticks, panel.log_y)) for x, y in line.points]
        parts += _drawn(places, COLOURS[number % len(COLOURS)])
        if len(panel.lines) > 1:
            colour = COLOURS[number % len(COLOURS)]
            parts += [f'<rect x="{LEFT + 8}" y="{TOP + 14 * number}" width="10" height="3" fill="{colour}"/>']
            parts += [_text(LEFT + 22, TOP + 5 + 14 * number, line.name)]
    return parts


def _drawn(places: Sequence[tuple[float, float]], colour: str) -> list[str]:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    dots = [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in places]
    return [f'<polyline class="line" stroke="{colour}" points="{path}"/>', *dots]


def _x(value: float, xs: Sequence[float]) -> float:
    """A doubling takes the same room everywhere."""
    low, high = math.log2(xs[0]), math.log2(xs[-1])
    share = (math.log2(value) - low) / (high - low) if high > low else 0.5
    return LEFT + 10 + share * (WIDTH - LEFT - RIGHT - 20)


def _y(value: float, y_ticks: Sequence[float], log: bool) -> float:
    low, high, at = ((math.log2(v) if log else v) for v in (y_ticks[0], y_ticks[-1], value))
    return HEIGHT - BOTTOM - (at - low) / (high - low) * (HEIGHT - TOP - BOTTOM)


def _powers(low: float, high: float) -> list[float]:
    """Powers of four from below `low` to above `high`, two at least."""
    first = math.floor(math.log2(low) / 2)
    last = max(first + 1, math.ceil(math.log2(high) / 2))
    return [4.0**power for power in range(first, last + 1)]


def _text(x: float, y: float, words: str, class_: str = "", anchor: str = "start") -> str:
    kind = f' class="{class_}"' if class_ else ""
    return f'<text{kind} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(words)}</text>'

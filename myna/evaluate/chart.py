"""The loss curve as inline SVG: stretched to any width, and labelled in HTML, so labels keep their size."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from myna.evaluate.page import Html, join, tag, text

MAX_POINTS: Final = 240
_WINDOWS: Final = 20
_MIN_POINTS_TO_SMOOTH: Final = 20


@dataclass(frozen=True)
class Point:
    """One step, or the mean of several neighbouring ones: `first_step` to `step`."""

    first_step: int
    step: int
    loss: float


def loss_points(steps: Sequence[int], losses: Sequence[float]) -> list[Point]:
    """At most `MAX_POINTS` points in the order of the steps, each the mean of as many as that takes."""
    width = max(1, math.ceil(len(steps) / MAX_POINTS))
    starts = range(0, len(steps), width)
    groups = [(steps[start : start + width], losses[start : start + width]) for start in starts]
    return [Point(first_step=s[0], step=s[-1], loss=sum(values) / len(values)) for s, values in groups]


def loss_curve(points: Sequence[Point]) -> Html:
    """Axes, the losses, their moving mean where there are many, and the words of each point."""
    top = ticks(0.0, max(point.loss for point in points))[-1]
    left, right = points[0].step, max(points[-1].step, points[0].step + 1)
    xs = [100 * (point.step - left) / (right - left) for point in points]
    ys = [100 - 100 * point.loss / top for point in points]
    y_ticks = [tick for tick in ticks(0.0, top) if tick <= top]
    x_ticks = [tick for tick in ticks(left, right) if left <= tick <= right and tick == int(tick)]
    drawing = tag(
        "svg",
        *(_line(0, 100 - 100 * tick / top, 100, 100 - 100 * tick / top, "grid") for tick in y_ticks),
        *_lines(xs, ys),
        *_columns(points, xs, ys),
        viewBox="0 0 100 100",
        preserveAspectRatio="none",
        role="img",
        aria_label=f"loss from {points[0].loss:.3g} to {points[-1].loss:.3g}",
    )
    labels = [_tick("y", "bottom", 100 * tick / top, f"{tick:g}") for tick in y_ticks]
    labels += [
        _tick("x", "left", 100 * (tick - left) / (right - left), _step_words(tick, x_ticks))
        for tick in x_ticks
    ]
    return tag("div", drawing, *labels, class_="chart")


def ticks(low: float, high: float, num_wanted: int = 5) -> list[float]:
    """Round numbers (1, 2, 2.5 or 5 times a power of ten) from below `low` to above `high`."""
    span = high - low if high > low else 1.0
    power = 10.0 ** math.floor(math.log10(span / num_wanted))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if span / (factor * power) <= num_wanted)
    first, last = math.floor(low / step), math.ceil((low + span) / step - 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def moving_mean(values: Sequence[float]) -> list[float]:
    """The mean of each value and as many neighbours on either side, fewer towards the ends.

    Centred, since a mean over the past alone would draw a falling loss too high.
    """
    reach = len(values) // _WINDOWS
    means = []
    for middle in range(len(values)):
        near = min(reach, middle, len(values) - 1 - middle)
        means.append(statistics.fmean(values[middle - near : middle + near + 1]))
    return means


def _lines(xs: Sequence[float], ys: Sequence[float]) -> list[Html]:
    if len(xs) < _MIN_POINTS_TO_SMOOTH:
        return [_polyline(xs, ys, "smooth")]
    return [_polyline(xs, ys, "raw"), _polyline(xs, moving_mean(ys), "smooth")]


def _columns(points: Sequence[Point], xs: Sequence[float], ys: Sequence[float]) -> list[Html]:
    """The whole column above a step answers the pointer, so a line one pixel wide need not be hit."""
    edges = [0.0, *((a + b) / 2 for a, b in itertools.pairwise(xs)), 100.0]
    return [
        tag(
            "g",
            tag("rect", x=f"{start:.2f}", y=0, width=f"{end - start:.2f}", height=100),
            _line(x, 0, x, 100, "rule"),
            _line(x, y, x, y, "dot"),
            tag("title", text(_words(point))),
            class_="point",
        )
        for point, x, y, (start, end) in zip(points, xs, ys, itertools.pairwise(edges), strict=True)
    ]


def _words(point: Point) -> str:
    steps = f"step {point.step}"
    if point.first_step != point.step:
        steps = f"steps {point.first_step} to {point.step}, mean"
    return f"{steps} · loss {point.loss:.4g}"


def _step_words(tick: float, x_ticks: Sequence[float]) -> str:
    """The first label says what is counted."""
    return f"step {tick:g}" if tick == x_ticks[0] else f"{tick:g}"


def _polyline(xs: Sequence[float], ys: Sequence[float], class_: str) -> Html:
    places = join((text(f"{x:.2f},{y:.2f}") for x, y in zip(xs, ys, strict=True)), " ")
    return tag("polyline", points=places, class_=class_)


def _line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Html:
    return tag("line", x1=f"{x1:.2f}", y1=f"{y1:.2f}", x2=f"{x2:.2f}", y2=f"{y2:.2f}", class_=class_)


def _tick(axis: str, side: str, share: float, words: str) -> Html:
    return tag("span", text(words), class_=f"tick {axis}", style=f"{side}:{share:.2f}%")

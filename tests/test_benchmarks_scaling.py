"""The pure parts of the scaling benchmark: its points, its page, its plot."""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

from _children import Child
from _lines import Line, Panel, draw
from _points import Point, made_rows, measured
from scaling import longest_rows, panels, scaling_page

from myna.errors import CheckFailed

ENDED = Child(seconds=20.0, peak_mb=1500.0, stdout="", stderr="", others=0.2)


def test_rows_of_a_point_differ_and_grow() -> None:
    short, long = (made_rows(4, Point("rows", 2, tokens)) for tokens in (128, 512))
    assert len({row["prompt"][:12] for row in short}) == 4
    words = [len((row["prompt"] + " " + row["completion"]).split()) for row in (short[0], long[0])]
    assert words == [97, 481]
    assert short == made_rows(4, Point("rows", 2, 128))


def test_a_point_is_the_median_without_its_first_step() -> None:
    point = Point("length", 1, 128, num_steps=4)
    metrics = [{"seconds": s, "tokens": 128} for s in (9.0, 1.0, 3.0, 2.0)]
    found = measured(point, ENDED, metrics, {"checkpoint_layers": 5}, fresh_mb=200.0)
    assert (found.seconds_a_step, found.own_mb, found.checkpoint_layers) == (2.0, 1300.0, 5)
    with pytest.raises(CheckFailed, match="3 steps instead of 4"):
        measured(point, ENDED, metrics[:3], {}, fresh_mb=0.0)


def test_the_scaling_page_answers_whether_long_rows_fit() -> None:
    point, metrics = (
        Point("checkpointing", 1, 4096, checkpointing="all", num_steps=2),
        [{"seconds": 4.0, "tokens": 4096}] * 2,
    )
    fits = measured(point, ENDED, metrics, {}, 200.0)
    large = replace(fits, peak_mb=4000.1, point=replace(point, checkpointing="none"))
    assert "are trained in 4,000 MB" in longest_rows([large, fits])
    assert "are not trained" in longest_rows([large])
    assert longest_rows([replace(fits, point=replace(point, row_tokens=128))]) == ""
    facts = dict.fromkeys(("date", "machine", "versions", "commit", "load_before", "command"), "x")
    page = scaling_page([fits], [Point("width", 8, 128, width=256)], facts, "plot.svg")
    assert "| 1 | 4,096 | packaged | all | 4,096 | 4.000 | 1024 | 1,500 | 1,300 | 20% |" in page.splitlines()
    assert (
        "Not measured, the time was up: width 8×128." in page
        and "![seconds and memory a step](plot.svg)" in page
    )


def test_the_plot_puts_points_where_they_belong() -> None:
    ys = {1: 2.0, 2: 8.0, 4: 32.0}
    drawing = draw(
        [Panel("t & t", "rows", (Line("a", tuple((float(x), y) for x, y in ys.items())),), log_y=True)], 3
    )
    root = ET.fromstring(drawing)
    (path,) = (element.get("points", "") for element in root.iter() if element.tag.endswith("polyline"))
    places = [tuple(map(float, place.split(","))) for place in path.split()]
    (x1, y1), (x2, y2), (x3, y3) = places
    assert x2 - x1 == pytest.approx(x3 - x2, abs=0.2) and x2 > x1, "a doubling takes the same room"
    assert y1 - y2 == pytest.approx(y2 - y3, abs=0.2) and y2 < y1, (
        "a power is a straight line, and more lies higher"
    )
    labels = [element.text for element in root.iter() if element.tag.endswith("text")]
    assert {"t & t", "rows", "1", "2", "4", "16", "64"} <= set(labels)


def test_panels_hold_each_axis_twice() -> None:
    points = [Point("rows", n, 128) for n in (2, 1)] + [Point("width", 8, 128, width=256)]
    found = [
        measured(replace(p, num_steps=2), ENDED, [{"seconds": 3.0, "tokens": 9}] * 2, {}, 0.0) for p in points
    ]
    made = panels(found)
    assert [panel.lines[0].points for panel in made] == [
        ((1.0, 3.0), (2.0, 3.0)),
        (),
        ((256.0, 3.0),),
        ((1.0, 1500.0), (2.0, 1500.0)),
        (),
        ((256.0, 1500.0),),
    ]
    assert draw(made, 3).count("<polyline") == 4, "an axis without points has no panel"

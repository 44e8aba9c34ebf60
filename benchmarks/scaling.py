"""Time and memory of a training step as rows a step, row length and model width grow; page and plot to benchmarks/results/.

    python benchmarks/scaling.py

Each point is a `myna train` of a few steps in a process of its own, on the packaged model or on a random one of that width.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from _children import fresh_torch_mb  # noqa: E402
from _lines import Line, Panel, draw  # noqa: E402
from _machine import (  # noqa: E402
    RESULTS_DIR,
    commit,
    load_average,
    machine,
    say,
    shown_command,
    today,
    versions,
)
from _points import NUM_LAYERS, Measured, Point, all_points, measure  # noqa: E402
from _race_page import table  # noqa: E402

from myna.errors import MynaError  # noqa: E402

AXES = {
    "rows": "Rows a step, of about 128 tokens each (packaged model)",
    "length": "Row length, one row a step (packaged model)",
    "checkpointing": "The longest rows with layers run again in the backward (packaged model)",
    "width": f"Model width: random weights, {NUM_LAYERS} layers, vocabulary of 400, 8 rows a step",
}
# of the plot: what is written under an axis, and the field of a point that runs along it
ACROSS = {
    "rows": ("rows a step", "rows_a_step"),
    "length": ("tokens a row", "row_tokens"),
    "width": ("width", "width"),
}
MOST_MB = 4000  # in which rows of LONGEST tokens are to be trained
LONGEST = 4096


def main() -> None:
    arguments = _arguments()
    facts = {
        "date": today(),
        "machine": machine(),
        "versions": ", ".join(f"{name} {version}" for name, version in versions(sys.executable).items()),
        "commit": commit(),
        "command": shown_command(sys.argv),
        "load_before": load_average(),
    }
    points = [point for point in all_points() if point.axis in arguments.axes]
    try:
        found, skipped = run_points(points, arguments.seconds)
    except MynaError as error:
        print(json.dumps({"error": error.as_json()}) if arguments.json else f"error: {error}")
        sys.exit(error.exit_code)
    place = arguments.results / f"{facts['date']}-scaling"
    arguments.results.mkdir(parents=True, exist_ok=True)
    page = scaling_page(found, skipped, facts, f"{place.name}.svg")
    place.with_suffix(".md").write_text(page, encoding="utf-8")
    place.with_suffix(".svg").write_text(draw(panels(found), num_columns=3), encoding="utf-8")
    result = {**facts, "points": [asdict(one) for one in found], "skipped": [asdict(one) for one in skipped]}
    place.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result) if arguments.json else page)
    say(f"written: {place.with_suffix('.md')}")


def run_points(points: Sequence[Point], seconds: float) -> tuple[list[Measured], list[Point]]:
    """Measures in order until the time is up; what was not begun by then comes back too, for the page to say so."""
    found: list[Measured] = []
    until = time.monotonic() + seconds
    fresh_mb = fresh_torch_mb(sys.executable)
    with tempfile.TemporaryDirectory(prefix="myna-scaling-") as scratch:
        for number, point in enumerate(points):
            if time.monotonic() > until:
                return found, list(points[number:])
            done = measure(point, Path(scratch), fresh_mb)
            say(f"{point}: {done.seconds_a_step:.2f} s a step, {done.peak_mb:.0f} MB")
            found.append(done)
    return found, []


def scaling_page(
    found: Sequence[Measured], skipped: Sequence[Point], facts: dict[str, str], plot_name: str
) -> str:
    """The page in Markdown; `plot_name` lies beside it."""
    parts = [
        "# How a training step grows",
        f"{facts['date']} · {facts['machine']} · {facts['versions']} · commit {facts['commit']}\n"
        f"load before (1, 5, 15 min): {facts['load_before']}\n\n`{facts['command']}`",
        "LoRA r 16 on all linear layers; each point a process of its own, the first step not counted. Peaks are of the "
        "whole process; beside them without what `import torch` alone takes.",
        f"![seconds and memory a step]({plot_name})",
        longest_rows(found),
    ]
    for axis, title in AXES.items():
        rows = [_cells(one) for one in found if one.point.axis == axis]
        columns = (
            "rows a step | tokens a row, about | width | layers run again | tokens a step | s a step | tokens/s | "
            "peak, MB | less `import torch` | cores taken by others"
        )
        parts += [f"## {title}", table(columns, rows)] if rows else []
    if skipped:
        names = ", ".join(f"{p.axis} {p.rows_a_step}×{p.row_tokens}" for p in skipped)
        parts.append(f"Not measured, the time was up: {names}.")
    return "\n\n".join(part for part in parts if part) + "\n"


def longest_rows(found: Sequence[Measured]) -> str:
    """Whether rows of 4,096 tokens are trained in 4 GB, by the peak of the whole process; empty where none was run."""
    long = [one for one in found if one.point.row_tokens == LONGEST and not one.point.width]
    if not long:
        return ""
    least = min(long, key=lambda one: one.peak_mb)
    answer = "are" if least.peak_mb <= MOST_MB else "are not"
    peaks = "; ".join(f"{one.point.checkpointing}: {one.peak_mb:,.0f} MB" for one in long)
    return (
        f"Rows of {LONGEST:,} tokens of the packaged model {answer} trained in {MOST_MB:,} MB "
        f"(peak of the whole process by `train.gradient_checkpointing`: {peaks})."
    )


def panels(found: Sequence[Measured]) -> list[Panel]:
    """Seconds above, memory below, one column an axis."""
    seconds = [
        Panel("seconds a step", words, (_line(found, axis, field, "seconds_a_step"),), log_y=True)
        for axis, (words, field) in ACROSS.items()
    ]
    memory = [
        Panel("peak memory, MB", words, (_line(found, axis, field, "peak_mb"),))
        for axis, (words, field) in ACROSS.items()
    ]
    return [*seconds, *memory]


def _line(found: Sequence[Measured], axis: str, field: str, figure: str) -> Line:
    points = [
        (float(getattr(one.point, field)), float(getattr(one, figure)))
        for one in found
        if one.point.axis == axis
    ]
    return Line(axis, tuple(sorted(points)))


def _cells(one: Measured) -> list[str]:
    point = one.point
    again = f"{point.checkpointing}"
    if one.checkpoint_layers is not None and point.checkpointing == "auto":
        again += f" ({one.checkpoint_layers or 'none'})"
    return [
        str(point.rows_a_step),
        f"{point.row_tokens:,}",
        str(point.width or "packaged"),
        again,
        f"{one.tokens_a_step:,.0f}",
        f"{one.seconds_a_step:.3f}",
        f"{one.tokens_a_step / one.seconds_a_step:.0f}",
        f"{one.peak_mb:,.0f}",
        f"{one.own_mb:,.0f}",
        f"{one.others:.0%}",
    ]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--axes", nargs="+", choices=tuple(AXES), default=list(AXES))
    add("--seconds", type=float, default=540, help="no point is begun after so many")
    add("--results", type=Path, default=RESULTS_DIR, help="the folder that page, plot and figures go to")
    add("--json", action="store_true", help="one JSON object on stdout in place of the page")
    return parser.parse_args()


if __name__ == "__main__":
    main()

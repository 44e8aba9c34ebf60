"""The page of a race in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from _laps import BATCH_SIZE, Course, Lap
from _race import Figure, Race, Spread, best_peer, figures, own_memory, speed, spread

QUIET_ENOUGH = 0.1  # the part of the cores that others may take before the page warns


@dataclass(frozen=True)
class Circumstances:
    """Where, when and with what a race was run; every value as the page shows it."""

    date: str
    machine: str
    versions: Mapping[str, str]
    commit: str
    command: str
    load_before: str


def race_page(race: Race, course: Course, where: Circumstances) -> str:
    """The whole page."""
    parts = [
        f"# Training on a CPU: {race.workload}",
        _heading(race, course, where),
        *_section("What it came to", figure_table(figures(race))),
        *_section("Quiet", lap_table(race, race.quiet)),
        *_section("Beside one single-threaded endless loop", lap_table(race, race.beside)),
        *_section("Loss by step", curve_table(_curves(race))),
        _notes(race),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _heading(race: Race, course: Course, where: Circumstances) -> str:
    versions = " · ".join(f"{side}: {text}" for side, text in where.versions.items())
    return "\n".join(
        [
            f"{where.date} · {where.machine} · {versions} · commit {where.commit}",
            f"load before (1, 5, 15 min): {where.load_before} · float product peak in this run: "
            f"{race.product_peak / 1e9:.0f} GFLOP/s",
            "",
            f"`{where.command}`",
            "",
            "LoRA r 16, alpha 16 on all linear layers of SmolLM2-135M (packaged, 4-bit base unpacked), "
            f"{BATCH_SIZE} rows a step, learning rate 2e-4, warm-up 5, linear, weight decay 0.01, loss on answers.",
            f"The first {course.num_rows} rows, {course.num_steps} steps of which the first {course.num_warm} are not "
            f"counted; each lap a process of its own, in turn; {_repeats(race)} of each.",
        ]
    )


def _repeats(race: Race) -> int:
    return max(len(laps) for laps in race.quiet.values())


def _section(title: str, table: str) -> list[str]:
    return [f"## {title}", table] if table else []


def table(columns: str, rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; empty where it has no rows. `columns` are their titles with | between."""
    if not rows:
        return ""
    titles = [title.strip() for title in columns.split("|")]
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def figure_table(found: Sequence[Figure]) -> str:
    """Ratios of medians with their spread over the rounds, and the bars."""
    columns = "figure | ratio of medians | lowest and highest round | must | goal | reached"
    return table(columns, [_figure_cells(figure) for figure in found])


def _figure_cells(figure: Figure) -> list[str]:
    bar, rounds = figure.bar, figure.spread
    sign = "≤" if bar and bar.at_most else "≥"
    bars = [f"{sign} {bar.must:g}", f"{sign} {bar.goal:g}"] if bar else ["", ""]
    between = f"{rounds.low:.2f} to {rounds.high:.2f}" if rounds else ""
    return [figure.what, f"{figure.value:.2f}", between, *bars, figure.verdict]


def lap_table(race: Race, laps: Mapping[str, Sequence[Lap]]) -> str:
    """Each variant's own figures: medians, and of tokens/s the lowest and the highest too."""
    columns = (
        "variant | tokens/s, median | lowest | highest | tokens a step | peak, MB | "
        "less `import torch` | whole process, s | cores taken by others, most | kernels"
    )
    return table(columns, [_lap_cells(race, name, done) for name, done in laps.items() if done])


def _lap_cells(race: Race, name: str, laps: Sequence[Lap]) -> list[str]:
    rate, first = speed(laps), laps[0]
    peak = spread([lap.peak_mb for lap in laps]).middle
    quiet = laps is race.quiet.get(name)
    own = f"{spread(own_memory(race, name)).middle:.0f}" if quiet else ""
    process = spread([lap.process_seconds for lap in laps]).middle
    cells = [name, *_rates(rate), f"{first.tokens_a_step:.0f}", f"{peak:.0f}", own, f"{process:.1f}"]
    return [*cells, f"{max(lap.others for lap in laps):.0%}", first.kernels or ""]


def _rates(rate: Spread) -> list[str]:
    return [f"{value:.1f}" for value in (rate.middle, rate.low, rate.high)]


def _curves(race: Race) -> dict[str, Sequence[float]]:
    """The loss of each step by variant, of its first lap; the peer's best for comparison."""
    best = best_peer(race)
    names = [variant.name for variant in race.myna] + ([best] if best else [])
    laps = {**{name: race.quiet[name] for name in names}, **race.curves}
    return {name: laps[name][0].losses for name in laps}


def curve_table(curves: Mapping[str, Sequence[float]]) -> str:
    """One row a step, one column a variant."""
    steps = zip_longest(*curves.values())
    rows = [
        [str(number), *("" if loss is None else f"{loss:.4f}" for loss in losses)]
        for number, losses in enumerate(steps, 1)
    ]
    return table(" | ".join(["step", *(name.replace("|", "/") for name in curves)]), rows)


def _notes(race: Race) -> str:
    notes = [
        "tokens/s are each row's own tokens over the seconds of the counted steps, on both sides; a token that is computed "
        "once for several rows counts in each. Loading, checkpoints and what lies between steps are not in it; they are in "
        "the seconds of the whole process.",
        "Peaks are the kernel's ru_maxrss of each process, taken the same way for both sides"
        + f" (`import torch` alone: {', '.join(f'{side} {mb:.0f} MB' for side, mb in race.fresh_mb.items())}).",
    ]
    taken = max(lap.others for laps in race.quiet.values() for lap in laps)
    if taken > QUIET_ENOUGH:
        notes.append(
            f"**The machine was not quiet**: in one of the laps other processes took {taken:.0%} of the cores' time. "
            "Run it again before a figure of this page is relied on."
        )
    if race.peers:
        notes.append(
            "Both sides are given the same rows and draw their own order from them, so losses of one step are of other "
            "rows: compare Myna's columns with each other, and the peer's with them only in its course."
        )
    if all(lap.flops_per_s is None for laps in race.quiet.values() for lap in laps):
        notes.append("Products were not counted in this run (metrics.jsonl has no product_flops).")
    return "## How to read it\n\n" + "\n".join(f"- {note}" for note in notes)

"""The sections of the report, each a pure function from what a run's files hold to markup."""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Mapping, Sequence
from typing import Final

from myna.evaluate.chart import MAX_POINTS, loss_curve, loss_points
from myna.evaluate.page import (
    NOTHING,
    Html,
    cell,
    facts,
    heading,
    join,
    missing,
    paragraph,
    row_name,
    section,
    table,
    tag,
    text,
)
from myna.evaluate.run_files import Entry, RunFiles
from myna.evaluate.scorers import exact_match
from myna.evaluate.words import count, date, duration, is_finite, optional, percent, three_decimals

_MAX_EXAMPLES: Final = 3


def headline(files: RunFiles) -> Html:
    """Name, what went in, and one sentence: did it help?"""
    info = files.info or {}
    source = info.get("source")
    adapter = files.recipe.adapter if files.recipe and source is None else None
    num_rows = info.get("data", {}).get("train", {}).get("rows")
    parts = [
        info.get("base", {}).get("name"),
        f"{count(num_rows)} rows" if num_rows is not None else None,
        f"{adapter.method} r {adapter.r}, alpha {adapter.alpha:g}" if adapter else None,
        f"not trained here: {source['kind']} {source['path']}" if source else None,
        date(info["created"]) if "created" in info else None,
    ]
    by = paragraph(text(" · ".join(str(part) for part in parts if part)), class_="by")
    name = str(info.get("name", files.run.name))
    return tag("header", tag("h1", text(name)), by, _did_it_help(files.evaluation))


def _did_it_help(evaluation: Entry | None) -> Html:
    results = (evaluation or {}).get("results", {})
    if evaluation is None or "base" not in results or "tuned" not in results:
        return paragraph(text("Not evaluated yet, so nobody knows whether it helped."), class_="answer")
    scorer = evaluation.get("scorer", "exact_match")
    base, tuned = results["base"], results["tuned"]
    before, after = (_score_words(result, scorer) for result in (base, tuned))
    what = "exactly right answers" if scorer == "exact_match" else str(scorer).replace("_", " ")
    verdict, after_verdict = _verdict(base, tuned, scorer)
    return paragraph(
        text(f"{verdict} On {count(tuned['num_rows'])} held-out rows, {what} went from "),
        *before,
        text(" to "),
        *after,
        text(f".{after_verdict}"),
        class_="answer",
    )


def _score_words(result: Entry, scorer: str) -> tuple[Html, Html]:
    bold = tag("b", text(f"{percent(result[scorer])}\u00a0%"))
    if scorer != "exact_match":
        return bold, NOTHING
    low, high = result["interval"]
    return bold, tag("span", text(f" ({percent(low)} to {percent(high)})"), class_="quiet")


def _verdict(base: Entry, tuned: Entry, scorer: str) -> tuple[str, str]:
    """How to begin and how to end. Sure where the 95 % intervals are apart; other scores have none."""
    better = tuned[scorer] - base[scorer]
    if better == 0:
        return "It made no difference.", ""
    reach_base, reach_tuned = base["interval"], tuned["interval"]
    apart = max(reach_base[0], reach_tuned[0]) > min(reach_base[1], reach_tuned[1])
    if apart or scorer != "exact_match":
        return ("It helped." if better > 0 else "It did harm."), ""
    first = "It may have helped." if better > 0 else "It did not help."
    return first, " The intervals overlap: more held-out rows would tell."


def results(files: RunFiles) -> Html:
    """One row each for base, tuned and every file."""
    title = "Did it help?"
    found = (files.evaluation or {}).get("results", {})
    if not found:
        return section(title, missing("No evaluation.json in this run."))
    extra = [key for key in ("field_f1", "token_f1", "loss") if _is_shown(key, files.evaluation or {})]
    head = [heading(""), heading("exact match, %", "number"), heading("95 % interval"), _SCALE_HEADING]
    head += [
        heading({"field_f1": "field F1, %", "token_f1": "token F1, %"}.get(k, k), "number") for k in extra
    ]
    head += [heading("MB", "number"), heading("tokens/s", "number")]
    rows = [_result_row(name, result, extra) for name, result in found.items()]
    return section(title, table(head, rows), _file_words(found))


_SCALE_HEADING: Final = tag(
    "th", tag("span", tag("span", text("0")), tag("span", text("100 %")), class_="ends"), class_="bar"
)


def _is_shown(key: str, evaluation: Entry) -> bool:
    if key == "token_f1" and evaluation.get("scorer") != "token_f1":
        return False
    return any(result.get(key) is not None for result in evaluation["results"].values())


def _result_row(name: str, result: Entry, extra: Sequence[str]) -> Html:
    low, high = result["interval"]
    middle = [optional(result.get(key), percent if key != "loss" else three_decimals) for key in extra]
    return tag(
        "tr",
        row_name(name),
        cell(percent(result["exact_match"]), "number"),
        cell(f"{percent(low)} – {percent(high)}", "range"),
        tag("td", _interval_bar(result["exact_match"], low, high), class_="bar"),
        *(cell(words, "number") for words in middle),
        cell(optional(result.get("mb"), lambda mb: f"{mb:,.1f}"), "number"),
        cell(optional(result.get("tokens_per_s"), lambda speed: f"{speed:,.0f}"), "number"),
        class_=None if name == "base" else "taught",
    )


def _interval_bar(share: float, low: float, high: float) -> Html:
    reach = tag("i", style=f"left:{100 * low:.2f}%;width:{100 * (high - low):.2f}%")
    return tag("span", reach, tag("b", style=f"left:{100 * share:.2f}%"), class_="scale", aria_hidden="true")


def _file_words(found: Mapping[str, Entry]) -> Html:
    """What each file costs and saves against the tuned model."""
    tuned = found.get("tuned", {})
    sentences = []
    for name, result in found.items():
        if name in ("base", "tuned") or not tuned.get("mb") or not result.get("mb"):
            continue
        points = 100 * (result["exact_match"] - tuned["exact_match"])
        kept = (
            "as often right"
            if points == 0
            else f"{abs(points):.1f} points {'higher' if points > 0 else 'lower'}"
        )
        sentences.append(f"{name} is {tuned['mb'] / result['mb']:.1f} times smaller than tuned and {kept}.")
    return paragraph(text(" ".join(sentences)), class_="quiet small") if sentences else NOTHING


def training(files: RunFiles) -> Html:
    """The loss curve, and what the training took."""
    title = "Training loss"
    steps = [line for line in files.metrics if is_finite(line.get("loss"))]
    if not steps:
        return section(title, missing("No metrics.jsonl in this run."))
    points = loss_points([line["step"] for line in steps], [line["loss"] for line in steps])
    thinned = f", {MAX_POINTS} points at most" if len(points) < len(steps) else ""
    note = f"Loss per target token at each step{thinned}; point at the curve for the numbers."
    return section(
        title, loss_curve(points), _training_facts(files, steps), paragraph(text(note), class_="quiet small")
    )


def _training_facts(files: RunFiles, steps: Sequence[Entry]) -> Html:
    stage = (files.info or {}).get("stages", {}).get("train", {})
    speeds = [line["tokens_per_s"] for line in steps if is_finite(line.get("tokens_per_s"))]
    peaks = [line["peak_mb"] for line in steps if is_finite(line.get("peak_mb"))]
    targets = sum(line.get("target_tokens", 0) for line in files.metrics)
    validated = [line["validation_loss"] for line in steps if is_finite(line.get("validation_loss"))]
    pairs = [
        ("steps", count(steps[-1]["step"])),
        ("loss", f"{steps[0]['loss']:.3f} → {steps[-1]['loss']:.3f}"),
        ("validation loss", f"{validated[0]:.3f} → {validated[-1]:.3f}" if validated else "–"),
        ("time", optional(stage.get("seconds"), duration)),
        ("target tokens", count(targets) if targets else "–"),
        ("tokens/s, median", f"{statistics.median(speeds):,.0f}" if speeds else "–"),
        ("peak memory", f"{max(peaks):,.0f} MB" if peaks else "–"),
        ("trained parameters", optional(stage.get("trainable_parameters"), count)),
    ]
    return facts((name, text(value)) for name, value in pairs if value != "–")


def examples(files: RunFiles) -> Html:
    """Three held-out rows: what was asked, what was expected, what each model said."""
    evaluation = files.evaluation or {}
    shown = evaluation.get("examples", [])[:_MAX_EXAMPLES]
    if not shown:
        return section("Before and after", missing("No answers were kept."))
    marked = evaluation.get("scorer", "exact_match") == "exact_match"
    return section("Before and after", *(_example(example, marked) for example in shown))


def _example(example: Mapping[str, str], marked: bool) -> Html:
    turns = []
    for name, said in example.items():
        parts = [text(said) if said else tag("span", text("(nothing)"), class_="quiet")]
        if marked and name not in ("prompt", "expected"):
            right = exact_match(said, example["expected"]) == 1.0
            words, class_ = ("✓ right", "mark right") if right else ("✗ wrong", "mark wrong")
            parts += [text("  "), tag("span", text(words), class_=class_)]
        turns.append((name, join(parts)))
    return tag("div", facts(turns, class_="turn"), class_="example")


def how_to_chat(files: RunFiles) -> Html:
    """Lines to paste; the run chats before any export too."""
    types = [name for name in (files.evaluation or {}).get("results", {}) if name not in ("base", "tuned")]
    types += [name for name in (files.parity or {}).get("files", {}) if name not in types]
    exported = (files.info or {}).get("stages", {}).get("export", {}).get("files", {})
    # a run that was copied keeps the names its files were given
    named = [
        exported.get(t, {}).get("path") or files.run.gguf_path(t).relative_to(files.run.path) for t in types
    ]
    paths = [files.run.path, *(files.run.path / path for path in named)]
    lines = [
        f"myna chat {shlex.quote(str(path))}" for path in paths if path == files.run.path or path.exists()
    ]
    return section("Talk to it", *(tag("pre", text(line)) for line in lines))


def inputs(files: RunFiles) -> Html:
    """What went in, by digest, and the versions that did the work."""
    info = files.info
    if info is None:
        return section("What went in", missing("No run.json in this run."))
    head = [heading(""), heading("name"), heading("rows", "number"), heading("sha-256")]
    base = info.get("base", {})
    rows = [_input_row("base", {"path": base.get("name"), **base})]
    rows += [
        _input_row(name, entry) for name, entry in info.get("data", {}).items() if isinstance(entry, Mapping)
    ]
    versions = ((name, text(version)) for name, version in info.get("versions", {}).items())
    return section(
        "What went in", tag("div", table(head, rows), class_="inputs"), facts(versions), _times(info)
    )


def _input_row(name: str, entry: Entry) -> Html:
    rows = cell(optional(entry.get("rows"), count), "number")
    digest = tag("td", tag("span", text(entry.get("sha256") or "–"), class_="hash"))
    return tag("tr", row_name(name), cell(entry.get("path") or "–"), rows, digest)


def _times(info: Entry) -> Html:
    seconds = {name: stage["seconds"] for name, stage in info.get("stages", {}).items() if "seconds" in stage}
    words = " · ".join(f"{name} {duration(value)}" for name, value in seconds.items())
    return missing(f"Time: {words}.") if words else NOTHING

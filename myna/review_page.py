"""`myna data check --html`: what was found in rows, on a page that stands alone. Texts of rows are not on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from myna.data.findings import Finding
from myna.data.review import Review
from myna.evaluate.page import (
    Html,
    cell,
    facts,
    heading,
    page,
    paragraph,
    row_name,
    section,
    table,
    tag,
    text,
)

STYLE: Final = """
.code { font-weight: 650; margin-right: .6rem; } .error .code { color: var(--bad); } .warning .code { color: var(--warm); }
.finding { padding: 1.1rem 0 .3rem; border-top: 1px solid var(--line); } .finding:first-of-type { border-top: 0; }
.finding ul { margin: .4rem 0 .6rem; padding-left: 1.1rem; } .finding li { margin: .15rem 0; overflow-wrap: anywhere; }
.cure { background: var(--wash); padding: .5rem .75rem; border-radius: 4px; font-size: .92rem; overflow-wrap: anywhere; }
td.length { width: 60%; vertical-align: middle; } .length i { display: block; height: .85rem; border-radius: 2px;
  background: var(--warm); min-width: 2px; }
"""


def review_page(reviews: Mapping[str, Review]) -> Html:
    """The whole document: one file's review, or those of all files of a recipe by the name of their setting."""
    one = next(iter(reviews.values()))
    title = "Rows" if len(reviews) > 1 else Path(one.path).name
    by = [] if len(reviews) > 1 else [paragraph(text(one.path), class_="by")]
    body = [
        part for name, review in reviews.items() for part in _file(name if len(reviews) > 1 else "", review)
    ]
    return page(f"{title}: what was found", tag("h1", text(title)), *by, *body, style=STYLE)


def _file(name: str, review: Review) -> list[Html]:
    lines = [
        (label, text(words)) for label, words in review.as_lines() if label not in ("histogram", "scripts")
    ]
    made = [paragraph(text(_verdict(review)), class_="answer")]
    if name:
        made.insert(0, tag("h2", text(f"data.{name} {review.path}")))
    made.append(section("The rows", facts(lines)))
    if review.tokens is not None and review.tokens.histogram:
        bars = [(f"at most {upper:,}", count) for upper, count in review.tokens.histogram]
        made.append(section("Tokens a row", _bars(("tokens", "rows"), bars)))
    if review.scripts:
        made.append(section("Scripts", _bars(("script", "conversations"), list(review.scripts.items()))))
    if review.findings:
        made.append(section("Findings", *map(_finding, review.findings)))
    return made


def _verdict(review: Review) -> str:
    num_warnings = sum(finding.count for finding in review.findings if finding.level == "warning")
    errors = _counted(review.num_errors, "error")
    return f"{_counted(review.num_rows, 'row')}, {errors}, {_counted(num_warnings, 'warning')}."


def _counted(count: int, what: str) -> str:
    return f"1 {what}" if count == 1 else f"{count or 'no'} {what}s" if count < 1000 else f"{count:,} {what}s"


def _bars(head: tuple[str, str], bars: Sequence[tuple[str, int]]) -> Html:
    most = max(count for _, count in bars) or 1
    rows = (
        tag(
            "tr",
            row_name(name),
            cell(f"{count:,}", "number"),
            tag(
                "td",
                tag("i", style=f"width:{100 * count / most:.1f}%") if count else text(""),
                class_="length",
            ),
        )
        for name, count in bars
    )
    return table([heading(head[0]), heading(head[1], "number"), heading("")], rows)


def _finding(finding: Finding) -> Html:
    title = (
        tag("span", text(finding.code), class_="code"),
        text(f"{finding.what}: {_counted(finding.count, finding.level)}"),
    )
    places = [tag("li", text(f"{where}: {message}")) for where, message in finding.places]
    if finding.count > len(finding.places):
        places.append(tag("li", text(f"and {finding.count - len(finding.places):,} more"), class_="quiet"))
    cures = (tag("p", text(cure), class_="cure") for cure in finding.cures)
    return tag("div", tag("div", *title), tag("ul", *places), *cures, class_=f"finding {finding.level}")

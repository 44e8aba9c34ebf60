"""A page that stands alone: HTML of which every text is escaped, one style, no script and no request.

`Html` is a type of its own, so that the type checker refuses a text where markup is meant: a text becomes
markup through `text`, and through nothing else.
"""

from __future__ import annotations

import html
from collections.abc import Iterable
from typing import Final, NewType

Html = NewType("Html", str)
NOTHING: Final = Html("")

# The page may load nothing from anywhere, even if a text got past the escaping.
_POLICY: Final = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def text(value: object) -> Html:
    """Any value as text: escaped, also for use in quotes. Half a surrogate, which no file holds, is `?`."""
    return Html(html.escape(str(value)).encode("utf-8", "replace").decode("utf-8"))


def join(parts: Iterable[Html], between: str = "") -> Html:
    return Html(str(text(between)).join(parts))


def tag(name: str, *children: Html, **attributes: object) -> Html:
    """`<name …>children</name>`. `class_` is class, `data_x` is data-x; what is None is left out."""
    given = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items()}
    inside = "".join(f' {key}="{text(value)}"' for key, value in given.items() if value is not None)
    return Html(f"<{name}{inside}>{join(children)}</{name}>")


def section(title: str, *children: Html) -> Html:
    return tag("section", tag("h2", text(title)), *children)


def paragraph(*children: Html, class_: str | None = None) -> Html:
    return tag("p", *children, class_=class_)


def missing(what: str) -> Html:
    """The word that stands for a part which the run has not made."""
    return paragraph(text(what), class_="quiet")


def table(head: Iterable[Html], rows: Iterable[Html]) -> Html:
    """Scrolls sideways by itself where it is wider than the screen."""
    parts = tag("thead", tag("tr", *head)), tag("tbody", *rows)
    return tag("div", tag("table", *parts), class_="wide", tabindex="0")


def heading(words: str, class_: str | None = None) -> Html:
    return tag("th", text(words), class_=class_, scope="col")


def row_name(words: str) -> Html:
    return tag("th", text(words), scope="row")


def cell(words: object, class_: str | None = None) -> Html:
    return tag("td", text(words), class_=class_)


def facts(pairs: Iterable[tuple[str, Html]], class_: str = "facts") -> Html:
    """Names and values, as a description list."""
    items = (tag("div", tag("dt", text(name)), tag("dd", value)) for name, value in pairs)
    return tag("dl", *items, class_=class_)


def page(title: str, *body: Html, style: str = "") -> Html:
    """The whole document; `style` is what this page has besides the style of all."""
    head = [
        Html('<meta charset="utf-8">'),
        Html(f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'),
        Html('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        Html('<meta name="color-scheme" content="light dark">'),
        Html('<link rel="icon" href="data:,">'),
        tag("title", text(title)),
        Html(f"<style>{STYLE}{style}</style>"),
    ]
    document = tag("html", tag("head", *head), tag("body", tag("main", *body)), lang="en")
    return Html(f"<!doctype html>\n{document}\n")


# A myna is dark, with a yellow beak: ink on paper, and one warm colour for what was taught.
STYLE: Final = """
:root {
  --paper: #fcfbf8; --ink: #21201d; --quiet: #6d6a63; --line: #e4e0d8; --wash: #f4f1ea;
  --warm: #b45309; --warm-wash: #f0c48a; --grey: #98938a; --good: #3f6b3a; --bad: #a33a2a;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #161513; --ink: #e8e4dc; --quiet: #9d988e; --line: #33302b; --wash: #1f1d1a;
    --warm: #f0a63a; --warm-wash: #7a5419; --grey: #7d786f; --good: #93bd8a; --bad: #e28b7a;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0; background: var(--paper); color: var(--ink); font: 400 1.0625rem/1.6 ui-sans-serif, system-ui,
    -apple-system, "Segoe UI", Roboto, "Noto Sans", "Liberation Sans", "Helvetica Neue", Arial, sans-serif;
  font-variant-numeric: tabular-nums; overflow-wrap: break-word;
}
main { max-width: 52rem; margin: 0 auto; padding: clamp(2.5rem, 8vw, 6rem) 1.5rem 5rem; }
h1 { font-size: clamp(2rem, 6vw, 2.75rem); line-height: 1.1; letter-spacing: -.025em; font-weight: 650;
  margin: 0 0 .6rem; overflow-wrap: anywhere; }
h2 { font-size: 1.3rem; line-height: 1.3; letter-spacing: -.01em; font-weight: 620; margin: 0 0 1rem; }
h3 { font-size: .9rem; font-weight: 600; margin: 2.5rem 0 .75rem; color: var(--quiet); }
section { margin-top: clamp(3.25rem, 8vw, 5rem); }
p { margin: 0 0 1rem; max-width: 40rem; }
.quiet, .by { color: var(--quiet); }
.by { font-size: .95rem; margin: 0; max-width: none; }
.small { font-size: .9rem; }
.answer { font-size: clamp(1.2rem, 3.2vw, 1.45rem); line-height: 1.45; margin: 2.25rem 0 0; max-width: 32em;
  text-wrap: pretty; }
.answer b { color: var(--warm); font-weight: 650; }
.wide { overflow-x: auto; margin: 0 0 1rem; }
table { border-collapse: collapse; width: 100%; font-size: .95rem; }
th, td { text-align: left; vertical-align: baseline; padding: .6rem 1.35rem .6rem 0; font-weight: 400; }
th:last-child, td:last-child { padding-right: 0; }
thead th { color: var(--quiet); font-size: .84rem; white-space: nowrap; padding-top: 0;
  border-bottom: 1px solid var(--line); vertical-align: bottom; }
tbody th { font-weight: 600; white-space: nowrap; }
tbody tr + tr > * { border-top: 1px solid var(--line); }
td.number, th.number { text-align: right; white-space: nowrap; }
td.range { color: var(--quiet); white-space: nowrap; padding-left: 0; }
td.bar { width: 26%; min-width: 6rem; vertical-align: middle; }
.scale { position: relative; display: block; height: .9rem; }
.scale::before { content: ""; position: absolute; inset: 50% 0 auto; border-top: 1px solid var(--line); }
.scale i, .scale b { position: absolute; top: 50%; background: var(--grey); }
.scale i { height: 5px; margin-top: -2px; border-radius: 3px; opacity: .45; }
.scale b { width: 11px; height: 11px; margin: -5px 0 0 -5.5px; border-radius: 50%; }
.ends { display: flex; justify-content: space-between; }
.taught .scale i { background: var(--warm); } .taught .scale b { background: var(--warm); }
dl { margin: 0; }
dd { margin: 0; }
dt { color: var(--quiet); font-size: .84rem; }
.facts { display: flex; flex-wrap: wrap; gap: 1.1rem 2.25rem; margin: 0 0 1.5rem; }
.facts dd { font-size: 1rem; }
.turn { margin: 0 0 .9rem; display: grid; grid-template-columns: 5.5rem 1fr; gap: .7rem 1.25rem; }
.turn dt { padding-top: .16rem; }
.turn dd { white-space: pre-wrap; overflow-wrap: anywhere; max-height: 18rem; overflow-y: auto; }
.turn > div { display: contents; }
.example { padding: 1.75rem 0 .6rem; border-top: 1px solid var(--line); }
.example:first-of-type { border-top: 0; padding-top: 0; }
.mark { font-style: normal; font-size: .84rem; white-space: nowrap; }
.right { color: var(--good); } .wrong { color: var(--bad); }
code, pre, .hash { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "Liberation Mono", monospace;
  font-size: .88em; }
pre { margin: 0 0 .5rem; padding: .85rem 1.1rem; background: var(--wash); border-radius: 8px;
  overflow-x: auto; user-select: all; -webkit-user-select: all; line-height: 1.5; }
.hash { overflow-wrap: anywhere; color: var(--quiet); font-size: .8em; }
.chart { position: relative; margin: 0 0 2.2rem 3rem; height: clamp(13rem, 40vw, 17rem); }
.chart svg { position: absolute; inset: 0; width: 100%; height: 100%; overflow: visible; }
.chart line, .chart polyline { vector-effect: non-scaling-stroke; fill: none; stroke-linejoin: round;
  stroke-linecap: round; }
.grid { stroke: var(--line); stroke-width: 1; }
.raw { stroke: var(--warm-wash); stroke-width: 1.25; }
.smooth { stroke: var(--warm); stroke-width: 2.25; }
.point rect { fill: transparent; }
.point line { stroke: transparent; }
.point:hover .rule { stroke: var(--quiet); stroke-width: 1; stroke-dasharray: 2 3; }
.point:hover .dot { stroke: var(--warm); stroke-width: 9; }
.tick { position: absolute; font-size: .8rem; line-height: 1; color: var(--quiet); }
.tick.y { right: calc(100% + .7rem); transform: translateY(50%); }
.tick.x { top: calc(100% + .6rem); transform: translateX(-50%); white-space: nowrap; }
.axis { position: absolute; font-size: .8rem; line-height: 1; color: var(--quiet); }
.inputs td { font-size: .9rem; }
footer { margin-top: 5rem; padding-top: 1.25rem; border-top: 1px solid var(--line); color: var(--quiet);
  font-size: .875rem; }
@media (max-width: 36rem) {
  td.bar, th.bar { display: none; }
  .turn { grid-template-columns: 1fr; }
  .turn { gap: 0; } .turn dt { padding-top: .8rem; }
  th, td { padding-right: .8rem; } thead th { white-space: normal; } table { font-size: .875rem; }
}
@media print { main { max-width: none; padding: 0; } section { break-inside: avoid; } }
"""

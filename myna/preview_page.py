"""`myna data show --html`: rows on a page that stands alone, what is trained in colour, every token to be pointed at.

Each line of a row has its own direction, by its first strong letter (`dir="auto"`), and a special token is set apart from it
(`bdi`): in a Persian line it stands at the line's end, and does not turn the words around it. Characters that only
direct or hide text are shown by their code.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from typing import Final

from myna.evaluate.page import Html, facts, page, paragraph, section, tag, text
from myna.preview import ShownRow, ShownToken

# Joiners that Persian, Indic scripts and emoji are written with: they shape letters and hide nothing.
JOINERS: Final = "\u200c\u200d"


def preview_page(title: str, rows: Sequence[ShownRow], base: str) -> Html:
    """The whole document."""
    legend = paragraph(
        tag("span", text("trained"), class_="t on"),
        text(" is what the loss looks at; "),
        tag("span", text("the rest"), class_="t"),
        text(" is what the model is given. "),
        tag("bdi", text("<special>"), class_="special"),
        text(" tokens are framed. Point at a row for the borders of its tokens, at a token for its id."),
        class_="small",
    )
    by = paragraph(text(f"{len(rows)} rows as {base} is trained on them"), class_="by")
    return page(title, tag("h1", text(title)), by, legend, *map(_row, rows), style=STYLE)


def _row(row: ShownRow) -> Html:
    told = [("tokens", f"{row.num_tokens:,}"), ("trained", f"{row.num_targets:,}")]
    if row.num_cut:
        told.append(("cut off at the end", f"{row.num_cut:,}"))
    lines = (tag("div", *line, dir="auto") for line in _lines(row.tokens))
    return section(
        row.place,
        facts((name, text(value)) for name, value in told),
        tag("div", *lines, class_="row", tabindex="0"),
    )


def _lines(tokens: Sequence[ShownToken]) -> Iterator[list[Html]]:
    """The tokens by line; one with a line break in it stands on both sides of the break."""
    line: list[Html] = []
    for token in tokens:
        first, *more = token.text.split("\n")
        line.append(_token(token, first, breaks=bool(more)))
        for number, part in enumerate(more, start=1):
            yield line
            line = []
            if part or number < len(more):
                line.append(_token(token, part, breaks=number < len(more)))
    if line:
        yield line


def _token(token: ShownToken, part: str, *, breaks: bool) -> Html:
    kind = " ".join(("t", *(("on",) if token.trained else ()), *(("special",) if token.special else ())))
    number = " + ".join(map(str, token.ids))
    inside = [*_visible(part), *([tag("i", class_="break")] if breaks else ())]
    return tag(
        "bdi" if token.special else "span", *inside, class_=kind, title=f"{number} · {_named(token.text)}"
    )


def _visible(part: str) -> Iterator[Html]:
    """The text, and the codes of its characters that nobody sees."""
    plain = ""
    for character in part:
        if _is_hidden(character):
            yield text(plain)
            plain = ""
            yield tag("i", text(f"U+{ord(character):04X}"), class_="code")
        else:
            plain += character
    yield text(plain)


def _is_hidden(character: str) -> bool:
    """Controls, and what directs or joins without being seen (categories Cc, Cf), but for tabs and joiners."""
    return unicodedata.category(character) in ("Cc", "Cf") and character not in f"\t{JOINERS}"


def _named(words: str) -> str:
    return "".join(
        c if c.isprintable() else unicodedata.name(c, f"U+{ord(c):04X}").lower() for c in words
    ).replace("u+", "U+")


STYLE: Final = """
.by + .small { margin-top: 1.1rem; }
.row { white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.75; max-height: 44rem; overflow-y: auto;
  padding: 1rem 1.15rem; background: var(--wash); border-radius: 8px; tab-size: 4; }
.row > div { min-height: 1.75em; text-align: start; }
.t { color: var(--quiet); border-radius: 2px; }
.t.on { color: var(--ink); background: color-mix(in srgb, var(--warm-wash) 55%, transparent); }
.row:hover .t { outline: 1px solid color-mix(in srgb, var(--grey) 45%, transparent); outline-offset: -1px; }
.row .t:hover { outline: 2px solid var(--warm); }
.special { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "Liberation Mono", monospace; font-size: .82em;
  outline: 1px solid var(--grey); outline-offset: -1px; border-radius: 4px; padding: 0 .2em; direction: ltr; }
.break::after { content: "\\21b5"; color: var(--grey); font-style: normal; }
.code { font: 600 .7em ui-monospace, monospace; color: var(--bad); border: 1px solid currentColor; border-radius: 3px;
  padding: 0 .2em; margin: 0 .1em; unicode-bidi: isolate; direction: ltr; }
"""

"""What can be wrong with rows: one code for each kind of fault, and all faults of a file told at once."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from myna.data.conversation import Place
from myna.errors import DataError

# Codes stay: scripts and answers in forums rely on them. Gaps are room for kinds not thought of yet.
CODES: Mapping[str, str] = {
    "D001": "broken JSON",
    "D002": "not UTF-8",
    "D003": "a row that is no object",
    "D004": "a key twice in one object",
    "D005": "a broken table: header or cells",
    "D006": "no rows",
    "D007": "a file that cannot be read",
    "D010": "a shape that cannot be told",
    "D011": "rows of mixed shapes",
    "D012": "a missing key",
    "D013": "an empty text",
    "D014": "a value that is no text",
    "D015": "an unknown role",
    "D016": "turns out of order",
    "D017": "something not supported yet",
    "D018": "a pair that is none",
    "D019": "a tool call that does not hold",
    "D020": "nothing left to train on",
    # rows that can be read and may still be wrong: warnings
    "D030": "a conversation twice",
    "D031": "one prompt, two answers",
    "D032": "a prompt of the test rows",
    "D033": "one answer nearly always",
    "D034": "a control token in a text",
    "D035": "a word of two alphabets",
    "D036": "a secret or personal data",
    "D037": "the character NUL",
    "D038": "nearly the same conversation",
    # what only a tokenizer tells
    "D040": "more tokens than are read",
    "D041": "nothing to learn",
    "D042": "a row that the base's template refuses",
}

# What to do where the place of a fault knows nothing better. From D030 on every warning says its own.
CURES: Mapping[str, str] = {
    "D001": "mend the file at that place",
    "D002": "save the file as UTF-8",
    "D003": 'write the rows alone: [{"prompt": "...", "completion": "..."}, ...]',
    "D004": "take one of the two out, or give it a name of its own",
    "D005": "the first line names each column once, and every row has a cell for each",
    "D006": 'write at least one row into it: {"prompt": "...", "completion": "..."}',
    "D007": "look whether it is there, whole, and yours to read: ls -lL",
    "D010": "--set data.columns.prompt=KEY --set data.columns.completion=KEY, with your keys",
    "D011": "keep one shape in one file",
    "D012": "add it to the row, or take the row out",
    "D013": "fill it in, or take the row out",
    "D014": "write it as it should be, or take the row out",
    "D015": "the roles are system, user and assistant: rename it, or take the row out",
    "D016": "put the turns in order, or take the row out: user and assistant in turn, the assistant last",
    "D017": "take it out of the row, or take the row out",
    "D018": "a pair is two different answers to one prompt",
    "D019": "one result for each call, the calls as objects with a name and arguments; or take the row out",
    "D020": "bring more rows, or ask for less of them: data.test_fraction, data.language",
}

SHOWN_PLACES = 3
SHOWN_NAMES = 12


def fault(
    code: str, message: str, *, where: Place | str, help: str | None = None, ends_reading: bool = False
) -> DataError:
    """One fault as the error that it is; the reader decides whether to raise it or to go on collecting.

    Without `help` it has the cure of its code.
    """
    assert code in CODES, code
    error = DataError(message, where=str(where), help=help or CURES.get(code), code=code)
    error.place = where if isinstance(where, Place) else None
    error.ends_reading = ends_reading
    return error


def gathered(faults: Sequence[DataError], path: Path) -> DataError:
    """All faults of a file as one error: grouped by code, counted, with the first three places of each.

    error[D001] train.jsonl:4: broken JSON at column 3: ...
    error[D012] train.jsonl:7: `completion` is missing; the keys are: prompt, anser
      and 12 more
      help: --set data.columns.completion=anser
    """
    assert faults
    if len(faults) == 1:
        return faults[0]
    groups: dict[str, list[DataError]] = {}
    for one in faults:
        groups.setdefault(one.code, []).append(one)
    only = len(groups) == 1
    lines = [f"{len(faults)} faults"]
    for code in sorted(groups):
        lines += _group_lines(code, groups[code], with_help=not only)
    return DataError(
        "\n".join(lines),
        where=str(path),
        help="; ".join(_cures(faults)) if only else None,
        code=faults[0].code if only else None,
    )


def _group_lines(code: str, group: Sequence[DataError], *, with_help: bool) -> list[str]:
    lines = [f"error[{code}] {one.where}: {one.message}" for one in group[:SHOWN_PLACES]]
    if len(group) > SHOWN_PLACES:
        lines.append(f"  and {len(group) - SHOWN_PLACES} more")
    if with_help:
        lines += [f"  help: {cure}" for cure in _cures(group)]
    return lines


def _cures(group: Sequence[DataError]) -> list[str]:
    """The different cures of the faults that are shown."""
    return list(dict.fromkeys(one.help for one in group[:SHOWN_PLACES] if one.help))


@functools.lru_cache(1024)  # the keys of rows, again and again
def shown(text: str, width: int = 60) -> str:
    """A text of the user's, fit for a terminal: cut, and nothing in it that is not printable."""
    short = text if len(text) <= width else text[: width - 1] + "…"
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in short)


def named(names: Iterable[str]) -> str:
    """Keys or columns in one line: `a, b, c`, cut after a dozen."""
    every = [shown(name) or "(no name)" for name in names]
    more = f" and {len(every) - SHOWN_NAMES} more" if len(every) > SHOWN_NAMES else ""
    return ", ".join(every[:SHOWN_NAMES]) + more


def nearest(wanted: Iterable[str], names: Iterable[str]) -> str | None:
    """The name most like one of `wanted`, small and capital letters alike, or None where none is near."""
    by_small = {name.lower(): name for name in names}
    best, best_ratio = None, 0.6
    for one in wanted:
        for near in difflib.get_close_matches(one.lower(), by_small, n=1, cutoff=best_ratio):
            ratio = difflib.SequenceMatcher(None, near, one.lower()).ratio()
            if best is None or ratio > best_ratio:
                best, best_ratio = by_small[near], ratio
    return best

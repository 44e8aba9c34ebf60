"""From a row of any known shape to a Conversation: a table of shapes, and how a file's shape is found out."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from myna.data.check import fault, named, nearest, shown
from myna.data.conversation import Conversation, Message, Row
from myna.data.turns import TURN_KEYS, read_text, read_turns
from myna.errors import DataError, RecipeError

Keys = Mapping[str, str]


@dataclass(frozen=True)
class Column:
    """One thing a shape needs: our name for it, and the keys it goes by; the first one found is taken."""

    name: str
    keys: tuple[str, ...]
    required: bool = True


@dataclass(frozen=True)
class Format:
    """A shape of rows. `read` makes messages of a row, given which of the row's keys is which column."""

    name: str
    title: str
    description: str
    columns: tuple[Column, ...]
    read: Callable[[Row, Keys], tuple[Message, ...]]


@dataclass(frozen=True)
class Detected:
    """What a file's shape was found to be.

    `confidence` is the share of rows that have the required keys, 0 to 1; `keys` maps our columns to the
    file's keys; `ignored` are the keys that are not read, those inside messages as `messages.name`.
    """

    name: str
    confidence: float
    keys: Mapping[str, str]
    ignored: tuple[str, ...]


def _read_pair(row: Row, keys: Keys) -> tuple[Message, ...]:
    return _asked_and_answered(row, keys, _text_of(row, keys["prompt"]), keys["completion"])


def _read_alpaca(row: Row, keys: Keys) -> tuple[Message, ...]:
    prompt = _text_of(row, keys["instruction"])
    if _is_filled(row, keys.get("input")):
        prompt += "\n\n" + _text_of(row, keys["input"])
    return _asked_and_answered(row, keys, prompt, keys["output"])


def _asked_and_answered(row: Row, keys: Keys, prompt: str, answer_key: str) -> tuple[Message, ...]:
    answer = _text_of(row, answer_key)
    return (*_system_of(row, keys), Message("user", prompt), Message("assistant", answer))


def _read_messages(row: Row, keys: Keys) -> tuple[Message, ...]:
    return _read_turns_of(row, keys, keys["messages"])


def _read_conversations(row: Row, keys: Keys) -> tuple[Message, ...]:
    return _read_turns_of(row, keys, keys["conversations"])


def _read_turns_of(row: Row, keys: Keys, key: str) -> tuple[Message, ...]:
    messages = read_turns(row.values[key], key, row.place)
    system = _system_of(row, keys)
    if system and messages[0].role == "system":
        message = f"two system messages: `{shown(keys['system'])}` and the first of `{shown(key)}`"
        raise fault("D016", message, where=row.place, help="take one of the two out")
    return (*system, *messages)


def _system_of(row: Row, keys: Keys) -> tuple[Message, ...]:
    key = keys.get("system")
    return (Message("system", _text_of(row, key)),) if key is not None and _is_filled(row, key) else ()


def _text_of(row: Row, key: str) -> str:
    return read_text(row.values[key], f"`{shown(key)}`", row.place)


def _is_filled(row: Row, key: str | None) -> bool:
    value = row.values.get(key) if key is not None else None
    return value is not None and not (isinstance(value, str) and not value.strip())


ANSWER_KEYS = ("completion", "answer", "response", "output")
SYSTEM = Column("system", ("system",), required=False)

# Where two shapes fit a file equally well, the earlier line is taken.
FORMATS: tuple[Format, ...] = (
    Format(
        "messages",
        "OpenAI messages",
        '{"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}',
        (Column("messages", ("messages",)), SYSTEM),
        _read_messages,
    ),
    Format(
        "sharegpt",
        "ShareGPT",
        '{"conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}]}',
        (Column("conversations", ("conversations",)), SYSTEM),
        _read_conversations,
    ),
    Format(
        "alpaca",
        "Alpaca",
        '{"instruction": ..., "input": ..., "output": ...}, where input may be left out',
        (
            Column("instruction", ("instruction",)),
            Column("input", ("input", "context"), required=False),
            Column("output", ("output", "response", "completion", "answer")),
            SYSTEM,
        ),
        _read_alpaca,
    ),
    Format(
        "prompt_answer",
        "prompt/answer",
        '{"prompt": ..., "completion": ...}, or question, query, input and answer, response, output',
        (
            Column("prompt", ("prompt", "question", "query", "input")),
            Column("completion", ANSWER_KEYS),
            SYSTEM,
        ),
        _read_pair,
    ),
)


def format_named(name: str) -> Format:
    """The table's line of that name. Raises RecipeError with the nearest name."""
    for one in FORMATS:
        if one.name == name:
            return one
    names = [one.name for one in FORMATS]
    near = nearest([name], names)
    cure = f"--set data.format={near}" if near else "--set data.format=auto"
    raise RecipeError(f"data.format: {shown(name)} is not one of auto, {named(names)}", help=cure)


def to_conversation(row: Row, format_name: str, columns: Mapping[str, str]) -> Conversation:
    """The row as a Conversation; `columns` maps our column names to the row's keys where they differ.

    Raises DataError at the row's first fault, RecipeError for an unknown format.
    """
    shape = format_named(format_name)
    keys = _keys_of(row, shape, columns)
    missing = [c for c in shape.columns if c.required and c.name not in keys]
    if missing:
        raise _missing(row, missing[0], shape, columns)
    return Conversation(shape.read(row, keys), row.place)


def detect_format(
    rows: Sequence[Row], *, format_name: str = "auto", columns: Mapping[str, str] | None = None
) -> Detected:
    """The shape that fits most rows, by their keys alone.

    Raises DataError where no row fits any shape, and RecipeError where `format_name` or `columns` cannot be.
    Rows that do not fit the shape found lower `confidence`; `differing` says what is wrong with each.
    """
    assert rows
    columns = columns or {}
    best: Detected | None = None
    shapes = _candidates(format_name, columns)
    for shape in shapes:
        keys = _common_keys(rows, shape, columns)
        found = sum(_has_required(row, shape, keys) for row in rows) / len(rows) if keys else 0.0
        if found > (best.confidence if best else 0.0):
            best = Detected(shape.name, found, keys, ())
    if best is None:
        raise _untold(_typical(rows), shapes, columns)
    _refuse_unused(rows, best, columns)
    return Detected(best.name, best.confidence, best.keys, _ignored(rows, best.keys))


def differing(row: Row, detected: Detected) -> DataError | None:
    """What sets a row apart from its file's shape: another shape or a missing key. None where it fits."""
    shape = format_named(detected.name)
    if _has_required(row, shape, detected.keys):
        return None
    for other in FORMATS:
        keys = _keys_of(row, other, {})
        if _has_required(row, other, keys):
            ours, theirs = _required(shape, detected.keys), _required(other, keys)
            message = f"this row is {other.title} ({named(theirs)})"
            message += f", the others are read as {shape.title} ({named(ours)})"
            return fault("D011", message, where=row.place, help="keep one shape in one file")
    missing = next(c for c in shape.columns if c.required and detected.keys[c.name] not in row.values)
    return _missing(row, missing, shape, detected.keys, cure="rename it in this row or, if all have it so, ")


def _candidates(format_name: str, columns: Mapping[str, str]) -> list[Format]:
    """The shapes that may be meant: the one named, or all that have every column which `columns` names."""
    known = sorted({column.name for shape in FORMATS for column in shape.columns})
    for name in columns:
        if name not in known:
            near = nearest([name], known)
            meant = f" Did you mean data.columns.{near}?" if near else ""
            cure = f"the columns are: {named(known)}"
            raise RecipeError(f"data.columns.{shown(name)} is not a column.{meant}", help=cure)
    shapes = list(FORMATS) if format_name == "auto" else [format_named(format_name)]
    fitting = [shape for shape in shapes if columns.keys() <= {column.name for column in shape.columns}]
    if not fitting:
        what = "no shape has" if format_name == "auto" else f"{format_name} has not all of"
        cure = "; ".join(f"{shape.name}: {named(c.name for c in shape.columns)}" for shape in shapes)
        raise RecipeError(f"data.columns: {what} the columns {named(columns)}", help=cure)
    return fitting


def _keys_of(row: Row, shape: Format, columns: Mapping[str, str]) -> dict[str, str]:
    """Which key of the row is which column of the shape; columns that the row has not are left out."""
    keys = {}
    for column in shape.columns:
        wanted = (columns[column.name],) if column.name in columns else column.keys
        there = [key for key in wanted if key in row.values]
        filled = [key for key in there if row.values[key] is not None]
        if there:
            keys[column.name] = (filled or there)[0]
    return keys


def _common_keys(rows: Sequence[Row], shape: Format, columns: Mapping[str, str]) -> dict[str, str]:
    """The keys that most of the fitting rows go by: the required ones together, the others singly."""
    together: Counter[tuple[str, ...]] = Counter()
    alone: dict[str, Counter[str]] = {}
    names = [column.name for column in shape.columns if column.required]
    for row in rows:
        keys = _keys_of(row, shape, columns)
        if all(name in keys for name in names):
            together[tuple(keys[name] for name in names)] += 1
            for name in keys.keys() - set(names):
                alone.setdefault(name, Counter())[keys[name]] += 1
    if not together:
        return {}
    common = dict(zip(names, together.most_common(1)[0][0], strict=True))
    common |= {name: counts.most_common(1)[0][0] for name, counts in alone.items()}
    return {column.name: common[column.name] for column in shape.columns if column.name in common}


def _required(shape: Format, keys: Keys) -> list[str]:
    return [keys[column.name] for column in shape.columns if column.required and column.name in keys]


def _has_required(row: Row, shape: Format, keys: Keys) -> bool:
    return all(
        column.name in keys and keys[column.name] in row.values for column in shape.columns if column.required
    )


def _ignored(rows: Sequence[Row], keys: Keys) -> tuple[str, ...]:
    """Keys that are not read, in the order in which they first appear."""
    read = set(keys.values())
    seen: dict[str, None] = {}
    for row in rows:
        seen |= dict.fromkeys(key for key in row.values if key not in read)
        for name in ("messages", "conversations"):
            for turn in _turns_in(row.values.get(keys.get(name, ""))):
                seen |= dict.fromkeys(f"{keys[name]}.{key}" for key in turn if key not in TURN_KEYS)
    return tuple(seen)


def _turns_in(value: Any) -> list[Mapping[str, Any]]:
    return [turn for turn in value if isinstance(turn, dict)] if isinstance(value, list) else []


def _typical(rows: Sequence[Row]) -> Row:
    """The first row with the keys that most rows have: what an error about all of them is told by."""
    counts = Counter(tuple(row.values) for row in rows)
    common = counts.most_common(1)[0][0]
    return next(row for row in rows if tuple(row.values) == common)


def _untold(row: Row, shapes: Sequence[Format], columns: Mapping[str, str]) -> DataError:
    """The fault of a file that fits no shape: the one key that lacks, or all that would be read."""
    for shape in shapes:
        keys = _keys_of(row, shape, columns)
        missing = [c for c in shape.columns if c.required and c.name not in keys]
        named_by_user = len(shapes) == 1 or any(c.name in columns for c in missing)
        if _required(shape, keys) or named_by_user:
            return _missing(row, missing[0], shape, columns)
    lines = [f"the shape of the rows cannot be told; the keys are: {named(row.values)}. Rows may be:"]
    lines += [f"  {shape.name}: {shape.description}" for shape in shapes]
    pair = [*row.values, "KEY", "KEY"][:2]
    example = f"{_setting('prompt', pair[0])} {_setting('completion', pair[1])}"
    return fault("D010", "\n".join(lines), where=row.place, help=f"name the keys, for example {example}")


def _missing(
    row: Row, column: Column, shape: Format, columns: Mapping[str, str], cure: str = ""
) -> DataError:
    """The fault of a row without a required key: what it has, and the key that was probably meant."""
    wanted = columns.get(column.name, column.name)
    free = [key for key in row.values if key not in _keys_of(row, shape, columns).values()]
    near = nearest([wanted, *column.keys], free) or (free[0] if len(free) == 1 else None)
    keys = f"the keys are: {named(row.values)}" if row.values else "the row has no keys"
    if near:
        cure += _setting(column.name, near)
    elif free:
        cure += f"{_setting(column.name, 'KEY')}, where KEY is one of {named(free)}"
    else:
        cure = f"add `{shown(wanted)}` to the row, or take the row out"
    return fault("D012", f"`{shown(wanted)}` is missing; {keys}", where=row.place, help=cure)


def _setting(column_name: str, key: str) -> str:
    return "--set " + shlex.quote(f"data.columns.{column_name}={shown(key)}")


def _refuse_unused(rows: Sequence[Row], detected: Detected, columns: Mapping[str, str]) -> None:
    """A column that the user named and no row has, or one key taken for two columns."""
    for name, key in columns.items():
        if name not in detected.keys:
            message = (
                f"`{shown(key)}` (data.columns.{name}) is in no row; the keys are: {named(rows[0].values)}"
            )
            raise fault("D012", message, where=rows[0].place)
    twice = [key for key, count in Counter(detected.keys.values()).items() if count > 1]
    if twice:
        both = " and ".join(f"data.columns.{n}" for n, key in detected.keys.items() if key == twice[0])
        raise RecipeError(
            f"`{shown(twice[0])}` is taken for two columns: {both}", help="give each its own key"
        )

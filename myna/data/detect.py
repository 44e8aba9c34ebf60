"""How a file's shape is found out, and what sets one of its rows apart from the others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from types import MappingProxyType
from typing import Any

from myna.data.check import fault, named, nearest, shown
from myna.data.conversation import Row
from myna.data.formats import FORMATS, format_named, keys_of, missing_key, required_keys, setting
from myna.data.shapes import Format, Keys, always
from myna.data.turns import TURN_KEYS, unread_keys
from myna.errors import DataError, RecipeError

KNOWN_IN_TURNS = frozenset(TURN_KEYS)
LISTS_OF_TURNS = ("messages", "conversations")  # columns
MOST_GROUPS = 4096
MOST_SHAPES = 4  # that an error names
USUAL = ("messages", "sharegpt", "alpaca", "prompt_answer")  # these where none is nearer
LIKE = 0.75  # by difflib's ratio: below it `ticket` is like `text`
NO_COLUMNS: Mapping[str, str] = MappingProxyType({})


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


class Group:
    """Rows that have the same keys, and null under the same ones: what shapes ask of a row by its keys is the same for all.

    `first` is the first of them with texts and numbers taken out, `fitting` counts by a shape's name the rows whose values
    are that shape's, and `turn_keys` are the keys inside messages that are not read, by the key of the messages.
    """

    __slots__ = ("_asked", "_listed", "count", "first", "fitting", "turn_keys")

    def __init__(self, first: Row, shapes: Sequence[Format], columns: Mapping[str, str]) -> None:
        self.first = Row(
            {key: None if value is None else "" for key, value in first.values.items()}, first.place
        )
        self.count = 0
        self.fitting: dict[str, int] = {}
        self.turn_keys: dict[str, dict[str, None]] = {}
        self._listed = {}
        self._asked = []
        for shape in shapes:
            keys = keys_of(self.first, shape, columns)
            if shape.fits is not always and has_required(self.first, shape, keys):
                self._asked.append((shape.name, shape.fits, keys))
                self.fitting[shape.name] = 0
            for name in LISTS_OF_TURNS:
                if name in keys:
                    self._listed[keys[name]] = self.turn_keys.setdefault(keys[name], {})

    def add(self, row: Row) -> None:
        """Counts a row that has these keys."""
        self.count += 1
        for name, fits, keys in self._asked:
            if fits(row, keys):
                self.fitting[name] += 1
        for key, unread in self._listed.items():
            for turn in _turns_in(row.values[key]):
                if not turn.keys() <= KNOWN_IN_TURNS and len(unread) < MOST_GROUPS:
                    unread.update(dict.fromkeys(unread_keys(turn)))

    def join(self, later: Group) -> None:
        """Counts rows behind these too."""
        self.count += later.count
        for name, count in later.fitting.items():
            self.fitting[name] += count
        for key, unread in later.turn_keys.items():
            self.turn_keys[key].update(unread)

    def num_fitting(self, shape: Format) -> int:
        return self.count if shape.fits is always else self.fitting.get(shape.name, 0)


class Survey:
    """Rows counted as they pass, so that their shape can be told; of the rows themselves nothing is held.

    Raises RecipeError at once where `format_name` or `columns` cannot be.
    """

    def __init__(self, format_name: str = "auto", columns: Mapping[str, str] = NO_COLUMNS) -> None:
        self.columns = columns
        self.shapes = _candidates(format_name, columns)
        self._named = format_name != "auto"  # a shape that is named is held to its own faults
        self.groups: dict[Any, Group] = {}
        self._known = frozenset(columns.values()).union(*(c.keys for s in self.shapes for c in s.columns))
        self.num_rows = 0

    def add(self, row: Row) -> Group:
        """Counts a row; the group that it belongs to."""
        self.num_rows += 1
        values = row.values
        keys: Any = tuple(values)
        if None in values.values():
            keys = (keys, tuple(value is None for value in values.values()))
        group = self.groups.get(keys)
        if group is None:
            group = self._new_group(keys, row)
        group.add(row)
        return group

    def _new_group(self, keys: Any, row: Row) -> Group:
        """Past so many groups rows are told apart by known keys alone: rows may have keys of their own without end."""
        if len(self.groups) < MOST_GROUPS:
            group = Group(row, self.shapes, self.columns)
            self.groups[keys] = group
            return group
        known = {key: value for key, value in row.values.items() if key in self._known}
        keys = ("known", *((key, value is None) for key, value in known.items()))
        if keys not in self.groups:
            self.groups[keys] = Group(Row(known, row.place), self.shapes, self.columns)
        return self.groups[keys]

    def join(self, later: Mapping[Any, Group], num_rows: int) -> bool:
        """Counts rows behind these too, by their groups; False where they are so many that the order of all rows tells."""
        self.num_rows += num_rows
        for keys, group in later.items():
            if keys in self.groups:
                self.groups[keys].join(group)
            else:
                self.groups[keys] = group
        turn_keys = (keys for group in self.groups.values() for keys in group.turn_keys.values())
        return len(self.groups) < MOST_GROUPS and all(len(keys) < MOST_GROUPS for keys in turn_keys)

    def detected(self) -> Detected:
        """The shape that fits most rows. DataError where no row fits any, or a column that was named is in none."""
        best: Detected | None = None
        groups = list(self.groups.values())
        for shape in self.shapes:
            keys = _common_keys(groups, shape, self.columns)
            having = [group for group in groups if keys and has_required(group.first, shape, keys)]
            found = sum(group.count if self._named else group.num_fitting(shape) for group in having)
            if found / self.num_rows > (best.confidence if best else 0.0):
                best = Detected(shape.name, found / self.num_rows, keys, ())
        if best is None:
            raise _untold(max(groups, key=lambda group: group.count).first, self.shapes, self.columns)
        _refuse_unused(groups[0].first, best, self.columns)
        return Detected(best.name, best.confidence, best.keys, _ignored(groups, best.keys))


def detect_format(
    rows: Sequence[Row], *, format_name: str = "auto", columns: Mapping[str, str] | None = None
) -> Detected:
    """The shape that fits most rows: by their keys, and where two shapes have the same ones by what stands there.

    Raises DataError where no row fits any shape, and RecipeError where `format_name` or `columns` cannot be.
    Rows that do not fit the shape found lower `confidence`; `differing` says what is wrong with each.
    """
    assert rows
    survey = Survey(format_name, columns or {})
    for row in rows:
        survey.add(row)
    return survey.detected()


def differing(row: Row, detected: Detected) -> DataError | None:
    """What sets a row apart from its file's shape: another shape or a missing key. None where it fits."""
    shape = format_named(detected.name)
    if has_required(row, shape, detected.keys):
        return None
    for other in FORMATS:
        keys = keys_of(row, other, {})
        if has_required(row, other, keys) and other.fits(row, keys):
            ours, theirs = required_keys(shape, detected.keys), required_keys(other, keys)
            message = f"this row is {other.title} ({named(theirs)})"
            message += f", the others are read as {shape.title} ({named(ours)})"
            return fault("D011", message, where=row.place, help="keep one shape in one file")
    missing = next(c for c in shape.columns if c.required and detected.keys[c.name] not in row.values)
    return missing_key(
        row, missing, shape, detected.keys, cure="rename it in this row or, if all have it so, "
    )


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


def _common_keys(groups: Sequence[Group], shape: Format, columns: Mapping[str, str]) -> dict[str, str]:
    """The keys that most of the fitting rows go by: the required ones together, the others singly."""
    together: Counter[tuple[str, ...]] = Counter()
    alone: dict[str, Counter[str]] = {}
    names = [column.name for column in shape.columns if column.required]
    for group in groups:
        keys = keys_of(group.first, shape, columns)
        if all(name in keys for name in names):
            together[tuple(keys[name] for name in names)] += group.count
            for name in keys.keys() - set(names):
                alone.setdefault(name, Counter())[keys[name]] += group.count
    if not together:
        return {}
    common = dict(zip(names, together.most_common(1)[0][0], strict=True))
    common |= {name: counts.most_common(1)[0][0] for name, counts in alone.items()}
    return {column.name: common[column.name] for column in shape.columns if column.name in common}


def has_required(row: Row, shape: Format, keys: Keys) -> bool:
    """Whether the row has every key that the shape cannot do without."""
    return all(
        column.name in keys and keys[column.name] in row.values for column in shape.columns if column.required
    )


def _ignored(groups: Sequence[Group], keys: Keys) -> tuple[str, ...]:
    """Keys that are not read, those of rows before those of turns, in the order in which they first appear."""
    read = set(keys.values())
    seen = dict.fromkeys(key for group in groups for key in group.first.values if key not in read)
    for name in LISTS_OF_TURNS:
        for group in groups if name in keys else ():
            seen |= dict.fromkeys(f"{keys[name]}.{key}" for key in group.turn_keys.get(keys[name], ()))
    return tuple(seen)


def _turns_in(value: Any) -> list[Mapping[str, Any]]:
    return [turn for turn in value if isinstance(turn, dict)] if isinstance(value, list) else []


def _untold(row: Row, shapes: Sequence[Format], columns: Mapping[str, str]) -> DataError:
    """The fault of a file that fits no shape: what the nearest one lacks, or all that would be read."""
    found = [(shape, keys_of(row, shape, columns)) for shape in shapes]
    lacks = {
        shape.name: [c for c in shape.columns if c.required and c.name not in keys] for shape, keys in found
    }
    near = [
        (shape, keys)
        for shape, keys in found
        if lacks[shape.name]
        and (
            required_keys(shape, keys)
            or len(shapes) == 1
            or any(c.name in columns for c in lacks[shape.name])
        )
    ]
    if near:
        shape, _ = min(near, key=lambda one: (len(lacks[one[0].name]), -len(required_keys(*one))))
        return missing_key(row, lacks[shape.name][0], shape, columns)
    near_shapes = sorted(shapes, key=lambda shape: (-_num_near(row, shape), shape.name not in USUAL))[
        :MOST_SHAPES
    ]
    lines = [
        f"the shape of the rows cannot be told; the keys are: {named(row.values)}. The nearest shapes are:"
    ]
    lines += [f"  {shape.name}: {shape.description}" for shape in near_shapes]
    if len(shapes) > len(near_shapes):
        lines.append(f"and {len(shapes) - len(near_shapes)} more are in docs/data.md, under Shapes")
    # of more than two it is not guessed which: a guess that is pasted would train on something else without a word
    prompt, completion = row.values if len(row.values) == 2 else ("KEY", "KEY")
    example = f"{setting('prompt', prompt)} {setting('completion', completion)}"
    cure = f"name the keys: {example}; where these are a row already, the table needs a header above it"
    return fault("D010", "\n".join(lines), where=row.place, help=cure)


def _num_near(row: Row, shape: Format) -> int:
    """How many of the keys that a shape cannot do without are nearly in the row."""
    small = [key.lower() for key in row.values]
    wanted = [column.keys for column in shape.columns if column.required]
    return sum(any(get_close_matches(key, small, n=1, cutoff=LIKE) for key in keys) for keys in wanted)


def _refuse_unused(first: Row, detected: Detected, columns: Mapping[str, str]) -> None:
    """A column that the user named and no row has, or one key taken for two columns."""
    for name, key in columns.items():
        if name not in detected.keys:
            message = (
                f"`{shown(key)}` (data.columns.{name}) is in no row; the keys are: {named(first.values)}"
            )
            near = nearest([key, name], first.values)
            cure = setting(name, near or "KEY") + ("" if near else ", with a key of the rows")
            raise fault("D012", message, where=first.place, help=cure)
    twice = [key for key, count in Counter(detected.keys.values()).items() if count > 1]
    if twice:
        both = " and ".join(f"data.columns.{n}" for n, key in detected.keys.items() if key == twice[0])
        raise RecipeError(
            f"`{shown(twice[0])}` is taken for two columns: {both}", help="give each its own key"
        )

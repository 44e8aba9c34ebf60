"""What a shape of rows is made of: the columns it needs, and how its rows become conversations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from msgspec.structs import replace

from myna.data.check import fault, named, nearest, shown
from myna.data.conversation import Conversation, Message, Row
from myna.data.tools import read_tools, refuse_undescribed
from myna.data.turns import read_text
from myna.errors import DataError

Keys = Mapping[str, str]
PathChoice = Literal["best", "all"]


@dataclass(frozen=True)
class Reading:
    """What a recipe chooses where a row holds more than one conversation.

    `no_answer` is the answer to a question that its text does not answer; of trees of replies `paths` takes the best
    ranked or all, and `language` those in it alone; of logs of chats `assistant` is the
    speaker who is the assistant. Under `group_by` stands what tells which rows are held out together.
    """

    no_answer: str = "unanswerable"
    paths: PathChoice = "best"
    language: str | None = None
    group_by: str | None = None
    assistant: str | None = None


AS_THEY_COME = Reading()


@dataclass(frozen=True)
class Column:
    """One thing a shape needs: our name for it, and the keys it goes by; the first one found is taken."""

    name: str
    keys: tuple[str, ...]
    required: bool = True


Made = Iterable[Conversation | DataError]


def always(row: Row, keys: Keys) -> bool:
    """For shapes whose keys say enough."""
    return True


@dataclass(frozen=True)
class Format:
    """A shape of rows. `read` makes conversations of a row, given which of the row's keys is which column.

    `fits` says of a row with the keys whether its values are this shape's too. `gather` makes rows of rows where one
    conversation stands in several, `tell` says of all rows together what is worth saying. Rows of a shape that is not
    `trained` are read and checked, and not trained on yet.
    """

    name: str
    title: str
    description: str
    columns: tuple[Column, ...]
    read: Callable[[Row, Keys, Reading], Made]
    fits: Callable[[Row, Keys], bool] = always
    gather: Callable[[Sequence[Row], Keys], Iterator[Row | DataError]] | None = None
    tell: Callable[[Sequence[Row], Keys, Reading], Iterator[str]] | None = None
    trained: bool = True


def single(read: Callable[[Row, Keys], tuple[Message, ...]]) -> Callable[[Row, Keys, Reading], Made]:
    """The reader of a shape whose rows are one conversation each."""

    def read_one(row: Row, keys: Keys, reading: Reading) -> Made:
        try:
            messages = read(row, keys)
            tools = _tools_of(row, keys, messages) if "tools" in keys else ()
            return (Conversation(messages, row.place, tools),)
        except DataError as error:
            return (error,)

    return read_one


GROUP_CURE = (
    "add it to the rows; rows that `myna data convert` wrote have no keys of their own: "
    "give the table that they were made of"
)


def grouped(made: Made, row: Row, key: str) -> Made:
    """A row's conversations with what stands under `key` as their group; a fault where nothing does."""
    try:
        if key not in row.values:
            near = nearest([key], row.values)
            cure = f"--set data.group_by={shown(near)}" if near else GROUP_CURE
            message = f"`{shown(key)}` (data.group_by) is missing; the keys are: {named(row.values)}"
            raise fault("D012", message, where=row.place, help=cure)
        group = read_text(row.values[key], f"`{shown(key)}` (data.group_by)", row.place)
    except DataError as error:
        yield error
        return
    for one in made:
        yield one if isinstance(one, DataError) else replace(one, group=group)


def _tools_of(row: Row, keys: Keys, messages: Sequence[Message]) -> tuple[str, ...]:
    """The descriptions of the row's tools; none where the system text has them already, as Hermes' rows do."""
    tools = read_tools(row.values.get(keys["tools"]), keys["tools"], row.place)
    refuse_undescribed(messages, tools, row.place)
    return () if messages[0].role == "system" and "<tools>" in messages[0].content else tools


def text_of(row: Row, key: str) -> str:
    """A cell of a row as text. DataError where it is none."""
    value = row.values[key]
    if (
        type(value) is str and value.isascii() and value and not value.isspace()
    ):  # is_plain_text without a call
        return value
    return read_text(value, f"`{shown(key)}`", row.place)


def is_filled(row: Row, key: str | None) -> bool:
    """Whether the row has something under the key."""
    value = row.values.get(key) if key is not None else None
    return value is not None and not (isinstance(value, str) and not value.strip())


def is_objects(value: Any) -> bool:
    """A list of objects, at least one."""
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)

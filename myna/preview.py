"""`myna data show`: rendered rows as the model will see them, cut where the loss mask changes, down to single tokens."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.text import Text

from myna.data.check import shown
from myna.data.conversation import Conversation, Place
from myna.data.render import IGNORE, ChatTokenizer, Example, load_chat_tokenizer, render_examples
from myna.data.rows import load_rows, read_conversations, reading_of
from myna.data.sides import row_files
from myna.errors import DataError, UsageError
from myna.model.hub_rows import locate_data
from myna.model.sources import context_of, resolve_base
from myna.recipe import Recipe
from myna.settings import DEFAULT_MAX_LENGTH, DataSettings

CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # but tabs and line breaks
TRAINED, MASKED = "bold green", "dim"
PLACED = re.compile(r"(?P<path>.+?):(?: row)? ?(?P<line>[0-9]+)(?:, (?P<part>.*))?")


@dataclass(frozen=True)
class ShownToken:
    """A token and its text; several together where only they make whole characters."""

    ids: tuple[int, ...]
    text: str
    trained: bool
    special: bool


@dataclass(frozen=True)
class ShownRow:
    """One rendered row: pieces of text in order, each trained or masked as a whole, and the tokens that they are made of."""

    pieces: tuple[tuple[str, bool], ...]
    tokens: tuple[ShownToken, ...]
    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    num_targets: int
    num_cut: int
    place: str

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids)

    @property
    def summary(self) -> str:
        cut = f", {self.num_cut} more cut off" if self.num_cut else ""
        return f"{self.num_tokens} tokens, {self.num_targets} trained{cut}, from {self.place}"

    def as_text(self) -> Text:
        """Coloured for a terminal; without colours the trained pieces stand in «»."""
        text = Text()
        for piece, trained in self.pieces:
            words = CONTROLS.sub(lambda found: ascii(found[0])[1:-1], piece)  # a terminal would obey them
            text.append(f"«{words}»" if trained else words, style=TRAINED if trained else MASKED)
        return text

    def as_tokens(self) -> Text:
        """A token a line: its ids, and its text with everything visible in it; trained ones in «»."""
        lines = []
        for token in self.tokens:
            ids = "+".join(map(str, token.ids))
            words = shown(token.text, len(token.text))
            line = f"{ids:>8}  {f'«{words}»' if token.trained else f' {words}'}"
            lines.append(Text(line, style=TRAINED if token.trained else MASKED))
        return Text("\n").join(lines)

    def as_json(self, *, with_tokens: bool = False) -> Mapping[str, Any]:
        tokens = {"tokens": [asdict(token) for token in self.tokens]} if with_tokens else {}
        return {
            "pieces": [{"text": text, "trained": trained} for text, trained in self.pieces],
            **tokens,
            "input_ids": self.input_ids,
            "labels": self.labels,
            "num_cut": self.num_cut,
            "place": self.place,
        }


def preview_rows(
    recipe: Recipe, num_rows: int, say: Callable[[str], None], chosen: Sequence[str] = ()
) -> list[ShownRow]:
    """The first rows of data.train, or those that `chosen` names, rendered by the one function that training renders with;
    of a long text every piece.

    A row is named by its number in data.train (from 1, faulty ones not counted), or by its place in any file of the
    recipe, as errors tell it: `orders.jsonl:17`, `orders.json: row 17`; of a place with several conversations the first
    `num_rows` are shown. DataError where there is no such row, or where it is faulty.
    """
    data, _ = locate_data(recipe.data, say)
    found = (
        [one for name in chosen for one in _chosen(data, name, num_rows)]
        if chosen
        else _first(data, num_rows, say)
    )
    folder = resolve_base(recipe.model.base, say).folder
    tokenizer = load_chat_tokenizer(folder)
    max_length = data.max_length or min(context_of(folder) or DEFAULT_MAX_LENGTH, DEFAULT_MAX_LENGTH)
    return [shown_row(row, tokenizer) for one in found for row in render_examples(one, tokenizer, max_length)]


def _first(data: DataSettings, num_rows: int, say: Callable[[str], None]) -> list[Conversation]:
    loaded = load_rows(data.train, data, max_rows=num_rows)
    say(f"{Path(data.train).name}: {loaded.format_name}, the first {loaded.num_rows} rows")
    return [one.with_system(data.system) for one in loaded.conversations]


def _chosen(data: DataSettings, name: str, num_rows: int) -> list[Conversation]:
    """The conversations of the row that `name` means. Faulty rows beside it keep none from being shown."""
    if name.isascii() and name.isdigit() and int(name):
        return [_numbered(data, int(name))]
    named = PLACED.fullmatch(name)
    if named is None:
        raise UsageError(
            f"--row {name}: neither a number from 1 nor a place", help="--row 17, or --row orders.jsonl:17"
        )
    for path, settings in row_files(data).values():
        there = _placed(path, settings, named["path"], int(named["line"]), named["part"])
        if there:
            return [one.with_system(settings.system) for one in there[:num_rows]]
    raise DataError(
        f"there is no row at {name}",
        where=data.train,
        help="--row NUMBER counts rows from 1, whatever lines they stand on",
    )


def _placed(
    source: str, settings: DataSettings, path: str, line: int, part: str | None
) -> list[Conversation]:
    """The conversations at a place among the rows of `source`; its fault is raised where they are none."""
    one_file = Path(source).is_file()
    if one_file and not _is_at(Place(source, line), path, line, None):
        return []
    # no row stands before the line of its number; of several files each has a line of that number
    found, faults = _read(settings.model_copy(update={"train": source}), line if one_file else None)
    for fault in faults:
        if isinstance(fault.place, Place) and _is_at(fault.place, path, line, part):
            raise fault
    return [one for one in found if one.place and _is_at(one.place, path, line, part)]


def _numbered(data: DataSettings, number: int) -> Conversation:
    found, faults = _read(data, number)
    if len(found) < number and faults:
        found, faults = _read(data, None)
    if len(found) < number:
        raise DataError(f"there is no row {number}: there are {len(found)}", where=data.train)
    return found[number - 1].with_system(data.system)


def _read(data: DataSettings, max_rows: int | None) -> tuple[Sequence[Conversation], Sequence[DataError]]:
    """The conversations of the first rows, with the turns that the recipe trains, and the faults beside them."""
    read = read_conversations(
        Path(data.train),
        format_name=data.format,
        columns=data.columns,
        max_rows=max_rows,
        reading=reading_of(data),
    )
    read.require_trained()
    if data.train_on == "all":
        return read.conversations, read.faults
    return [one.last_turn_trained() for one in read.conversations], read.faults


def _is_at(place: Place, path: str, line: int, part: str | None) -> bool:
    same = place.path == path or Path(place.path).as_posix().endswith(f"/{path}")
    return same and place.line == line and part in (None, place.part)


def shown_row(row: Example, tokenizer: ChatTokenizer) -> ShownRow:
    """An example in pieces and tokens."""
    pairs = list(zip(row.input_ids_T.tolist(), (row.labels_T != IGNORE).tolist(), strict=True))
    runs = [
        (trained, [token for token, _ in run]) for trained, run in groupby(pairs, key=lambda pair: pair[1])
    ]
    pieces = [
        (str(tokenizer.tokenizer.decode(ids, skip_special_tokens=False)), trained) for trained, ids in runs
    ]
    return ShownRow(
        pieces=tuple(pieces),
        tokens=tuple(token for trained, ids in runs for token in _tokens(ids, trained, tokenizer)),
        input_ids=tuple(row.input_ids_T.tolist()),
        labels=tuple(row.labels_T.tolist()),
        num_targets=row.num_targets,
        num_cut=row.num_cut,
        place=str(row.place),
    )


def _tokens(ids: Sequence[int], trained: bool, tokenizer: ChatTokenizer) -> Iterator[ShownToken]:
    """The tokens of one piece; bytes that are no character wait for those that make it one."""
    from tokenizers.decoders import DecodeStream

    stream, waiting = DecodeStream(skip_special_tokens=False), list[int]()
    for token in ids:
        waiting.append(token)
        text = stream.step(tokenizer.tokenizer, token)
        if text is not None:
            yield ShownToken(tuple(waiting), text, trained, tokenizer.special_ids.issuperset(waiting))
            waiting = []
    if waiting:  # half a character at the end, or a token without text
        text = str(tokenizer.tokenizer.decode(waiting, skip_special_tokens=False))
        yield ShownToken(tuple(waiting), text, trained, tokenizer.special_ids.issuperset(waiting))

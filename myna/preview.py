"""`myna data show`: rendered rows as the model will see them, cut where the loss mask changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.text import Text

from myna.data.render import IGNORE, Example, load_chat_tokenizer, render_example
from myna.data.rows import load_rows
from myna.errors import DataError
from myna.model.sources import resolve_base
from myna.prepare import DEFAULT_MAX_LENGTH
from myna.recipe import Recipe

TRAINED, MASKED = "bold green", "dim"


@dataclass(frozen=True)
class ShownRow:
    """One rendered row: pieces of text in order, each trained or masked as a whole."""

    pieces: tuple[tuple[str, bool], ...]
    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    num_targets: int
    place: str

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids)

    def as_text(self) -> Text:
        """Coloured for a terminal; without colours the trained pieces stand in «»."""
        text = Text()
        for piece, trained in self.pieces:
            text.append(f"«{piece}»" if trained else piece, style=TRAINED if trained else MASKED)
        return text

    def as_json(self) -> Mapping[str, Any]:
        return {
            "pieces": [{"text": text, "trained": trained} for text, trained in self.pieces],
            "input_ids": self.input_ids,
            "labels": self.labels,
            "place": self.place,
        }


def preview_rows(recipe: Recipe, num_rows: int, say: Callable[[str], None]) -> list[ShownRow]:
    """The first rows of data.train, rendered by the one function that training renders with."""
    data = recipe.data
    loaded = load_rows(data.train, data, max_rows=num_rows)
    say(f"{Path(data.train).name}: {loaded.format_name}, the first {loaded.num_rows} rows")
    tokenizer = load_chat_tokenizer(resolve_base(recipe.model.base, say).folder)
    shown = []
    for conversation in loaded.conversations:
        row = render_example(
            conversation.with_system(data.system), tokenizer, data.max_length or DEFAULT_MAX_LENGTH
        )
        shown.append(_shown(row, str(conversation.place), tokenizer.tokenizer))
    if not shown:
        raise DataError("there are no rows", where=data.train)
    return shown


def _shown(row: Example, place: str, tokenizer: Any) -> ShownRow:
    pairs = list(zip(row.input_ids_T.tolist(), (row.labels_T != IGNORE).tolist(), strict=True))
    pieces = [
        (str(tokenizer.decode([token for token, _ in run], skip_special_tokens=False)), trained)
        for trained, run in groupby(pairs, key=lambda pair: pair[1])
    ]
    return ShownRow(
        pieces=tuple(pieces),
        input_ids=tuple(row.input_ids_T.tolist()),
        labels=tuple(row.labels_T.tolist()),
        num_targets=row.num_targets,
        place=place,
    )

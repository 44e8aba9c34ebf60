"""Which rows are trained on and which are held out: the same prompt never stands on both sides."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from myna.data.check import fault
from myna.data.conversation import Conversation
from myna.errors import DataError

ALL_TRAINED = "--set data.test_fraction=0 trains on every row and holds nothing out"


@dataclass(frozen=True)
class Split:
    """Each conversation once, in the order of the file."""

    train: tuple[Conversation, ...]
    validation: tuple[Conversation, ...]
    test: tuple[Conversation, ...]


def split_rows(
    conversations: Sequence[Conversation],
    *,
    test_fraction: float,
    validation_fraction: float = 0.0,
    seed: int,
) -> Split:
    """Holds out about these parts of the rows (0 to 1), at least one prompt for each part that is asked for.

    Prompts are ranked by a digest of the prompt and `seed`, so the choice depends on neither the order of the
    rows nor the machine, and few rows change sides when rows are added. Raises DataError where no row would
    be left to train on.
    """
    sizes: dict[str, int] = {}
    prompts = [_digest(conversation, seed) for conversation in conversations]
    for prompt in prompts:
        sizes[prompt] = sizes.get(prompt, 0) + 1
    num_parts = 1 + (test_fraction > 0) + (validation_fraction > 0)
    if len(sizes) < num_parts or test_fraction + validation_fraction >= 1:
        raise _nothing_left(conversations, len(sizes))
    ranked = sorted(sizes)
    test = _held_out(ranked, sizes, test_fraction * len(prompts), num_parts - 1)
    rest = [prompt for prompt in ranked if prompt not in test]
    validation = _held_out(rest, sizes, validation_fraction * len(prompts), 1)
    sides: dict[str, list[Conversation]] = {"train": [], "validation": [], "test": []}
    for prompt, conversation in zip(prompts, conversations, strict=True):
        side = "test" if prompt in test else "validation" if prompt in validation else "train"
        sides[side].append(conversation)
    return Split(tuple(sides["train"]), tuple(sides["validation"]), tuple(sides["test"]))


def drop_overlap(
    train: Sequence[Conversation], test: Sequence[Conversation]
) -> tuple[tuple[Conversation, ...], int]:
    """The training rows whose prompt does not stand in `test`, and how many were dropped for it."""
    held_out = {_digest(conversation, 0) for conversation in test}
    kept = tuple(conversation for conversation in train if _digest(conversation, 0) not in held_out)
    return kept, len(train) - len(kept)


def _digest(conversation: Conversation, seed: int) -> str:
    text = json.dumps([seed, conversation.prompt().as_dicts()])
    return hashlib.sha256(text.encode()).hexdigest()


def _held_out(ranked: Sequence[str], sizes: Mapping[str, int], num_rows: float, num_others: int) -> set[str]:
    """Prompts by rank as long as their rows fit into `num_rows`; where none fits, the one with fewest rows.

    `num_others` prompts are left at least, one for each part of the split that comes after.
    """
    if not num_rows:
        return set()
    chosen: set[str] = set()
    left = round(num_rows)
    for prompt in ranked:
        if sizes[prompt] <= left and len(chosen) < len(ranked) - num_others:
            chosen.add(prompt)
            left -= sizes[prompt]
    return chosen or {min(ranked, key=lambda prompt: sizes[prompt])}


def _nothing_left(conversations: Sequence[Conversation], num_prompts: int) -> DataError:
    rows = "1 row" if len(conversations) == 1 else f"{len(conversations)} rows"
    prompts = "1 prompt" if num_prompts == 1 else f"{num_prompts} different prompts"
    place = conversations[0].place if conversations else None
    where = place.path if place else "rows"
    message = f"nothing would be left to train on: {rows} with {prompts}, some of them to be held out"
    return fault("D020", message, where=where, help=ALL_TRAINED)

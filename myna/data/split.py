"""Which rows are trained on and which are held out: neither a prompt nor a group ever stands on two sides.

Rows are held out in units that stay together: those with the same prompt and, where the recipe groups them
(`data.group_by`), those of the same group. A prompt in two groups makes one unit of both.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from msgspec.structs import replace

from myna.data.check import fault
from myna.data.conversation import Conversation
from myna.errors import DataError

ALL_TRAINED = "--set data.test_fraction=0 trains on every row and holds nothing out"
ROWS_A_LABEL = 2  # with fewer rows to a label on average the answers are no labels


@dataclass(frozen=True)
class Split:
    """Each conversation once, in the order of the file."""

    train: tuple[Conversation, ...]
    validation: tuple[Conversation, ...]
    test: tuple[Conversation, ...]


@dataclass
class _Unit:
    """Rows that stay together: how many, and how many of each label."""

    num_rows: int = 0
    labels: Counter[str] = field(default_factory=Counter)


def split_rows(
    conversations: Sequence[Conversation],
    *,
    test_fraction: float,
    validation_fraction: float = 0.0,
    seed: int,
    stratify: bool = False,
    system: str | None = None,
) -> Split:
    """Holds out about these parts of the rows (0 to 1), at least one unit for each part that is asked for.

    Units are ranked by a digest of the prompt (of the group, where there is one) and `seed`, so the choice depends on
    neither the order of the rows nor the machine, and few rows change sides when rows are added. With `stratify` about
    these parts of each label, which is the answer, and each label keeps a row to train on. Prompts that `system` makes
    the same are the same. Raises DataError where no row would be left to train on, or no label could be held out.
    """
    ranks = _ranks(conversations, seed, system)
    units: dict[str, _Unit] = {}
    for rank, conversation in zip(ranks, conversations, strict=True):
        unit = units.setdefault(rank, _Unit())
        unit.num_rows += 1
        unit.labels[conversation.answer() if stratify else ""] += 1
    num_parts = 1 + (test_fraction > 0) + (validation_fraction > 0)
    if len(units) < num_parts or test_fraction + validation_fraction >= 1:
        raise _nothing_left(conversations, len(units))
    choose = _by_label if stratify and num_parts > 1 else _held_out
    ranked = {rank: units[rank] for rank in sorted(units)}
    if choose is _by_label:
        _refuse_no_labels(conversations)
    num_rows = len(conversations)
    test = choose(ranked, test_fraction, num_rows, num_parts - 1)
    rest = {rank: unit for rank, unit in ranked.items() if rank not in test}
    validation = choose(rest, validation_fraction, num_rows, 1)
    sides: dict[str, list[Conversation]] = {"train": [], "validation": [], "test": []}
    for rank, conversation in zip(ranks, conversations, strict=True):
        side = "test" if rank in test else "validation" if rank in validation else "train"
        sides[side].append(conversation)
    return Split(tuple(sides["train"]), tuple(sides["validation"]), tuple(sides["test"]))


def drop_overlap(
    rows: Sequence[Conversation], others: Sequence[Conversation], system: str | None = None
) -> tuple[tuple[Conversation, ...], int]:
    """The rows whose prompt (and group, where they have one) does not stand in `others`, and how many were dropped."""
    elsewhere = {key for conversation in others for key in _keys(conversation, 0, system)}
    kept = tuple(one for one in rows if elsewhere.isdisjoint(_keys(one, 0, system)))
    return kept, len(rows) - len(kept)


def drop_asked(
    rows: Sequence[Conversation], others: Sequence[Conversation]
) -> tuple[tuple[Conversation, ...], int]:
    """As `drop_overlap`, whatever the system texts: for rows of files that have system texts of their own."""
    elsewhere = {key for conversation in others for key in _keys(_without_system(conversation), 0, None)}
    kept = tuple(one for one in rows if elsewhere.isdisjoint(_keys(_without_system(one), 0, None)))
    return kept, len(rows) - len(kept)


def _without_system(conversation: Conversation) -> Conversation:
    messages = tuple(message for message in conversation.messages if message.role != "system")
    return replace(conversation, messages=messages)


def _without_ids(turn: dict[str, Any]) -> dict[str, Any]:
    """A turn without the ids of calls: they are drawn anew for each row, and say nothing."""
    kept = {key: value for key, value in turn.items() if key not in ("tool_calls", "tool_call_id")}
    if "tool_calls" in turn:
        kept["tool_calls"] = [call["function"] for call in turn["tool_calls"]]
    return kept


def _keys(conversation: Conversation, seed: int, system: str | None) -> Iterator[str]:
    """What ties a row to others: its prompt, the prompt as `system` makes it, its group."""
    yield _prompt_digest(conversation.asked_of(), seed)
    if system:
        yield _prompt_digest(conversation.with_system(system).asked_of(), seed)
    if conversation.group is not None:
        yield _group_digest(conversation.group, seed)


def _prompt_digest(prompt: Conversation, seed: int) -> str:
    turns = prompt.as_dicts() if not prompt.uses_tools else [_without_ids(turn) for turn in prompt.as_dicts()]
    return _digest(seed, turns, *prompt.tools)


def _digest(seed: int, *values: object) -> str:
    return hashlib.sha256(json.dumps([seed, *values]).encode()).hexdigest()


def _group_digest(group: str, seed: int) -> str:
    return _digest(seed, {"group": group})


def _ranks(conversations: Sequence[Conversation], seed: int, system: str | None) -> list[str]:
    """The rank of each row's unit: the least digest in it, of its groups where it has any, else of its prompts."""
    keys = [tuple(_keys(conversation, seed, system)) for conversation in conversations]
    if all(len(set(one)) == 1 for one in keys):
        return [one[0] for one in keys]
    parents: dict[str, str] = {}

    def root(key: str) -> str:
        while parents.setdefault(key, key) != key:
            parents[key] = parents[parents[key]]
            key = parents[key]
        return key

    for one in keys:
        for key in one[1:]:
            parents[root(key)] = root(one[0])
    least: dict[str, str] = {}
    for one, conversation in zip(keys, conversations, strict=True):
        rank = one[0] if conversation.group is None else one[-1]
        least[root(one[0])] = min(least.get(root(one[0]), rank), rank)
    return [least[root(one[0])] for one in keys]


def _held_out(ranked: Mapping[str, _Unit], fraction: float, num_rows: int, num_others: int) -> set[str]:
    """Units by rank as long as their rows fit into `fraction` of all; where none fits, the one with fewest rows.

    `num_others` units are left at least, one for each part of the split that comes after.
    """
    if not fraction * num_rows:
        return set()
    chosen: set[str] = set()
    left = round(fraction * num_rows)
    for rank, unit in ranked.items():
        if unit.num_rows <= left and len(chosen) < len(ranked) - num_others:
            chosen.add(rank)
            left -= unit.num_rows
    return chosen or {min(ranked, key=lambda rank: ranked[rank].num_rows)}


def _by_label(ranked: Mapping[str, _Unit], fraction: float, num_rows: int, num_others: int) -> set[str]:
    """Units by rank as long as the rows of each of their labels fit into that label's part.

    A label's part is `fraction` of its rows, in whole rows, the largest remainders first (Hamilton), so that the parts
    add up to `fraction` of all rows. Of each label one row stays, and one for each later part where there are so many.
    """
    if not fraction:
        return set()
    sizes: Counter[str] = Counter()
    for unit in ranked.values():
        sizes.update(unit.labels)
    of_these = fraction * num_rows / sizes.total()  # of the rows that earlier parts left
    left = {label: int(of_these * size) for label, size in sizes.items()}
    spare = round(of_these * sizes.total()) - sum(left.values())
    for label in sorted(sizes, key=lambda one: (int(of_these * sizes[one]) - of_these * sizes[one], one)):
        if spare > 0 and sizes[label] - left[label] > num_others:
            left[label] += 1
            spare -= 1
    chosen = set()
    for rank, unit in ranked.items():
        fits = all(count <= left[label] and count < sizes[label] for label, count in unit.labels.items())
        if fits:
            chosen.add(rank)
            for label, count in unit.labels.items():
                left[label] -= count
                sizes[label] -= count
    if not chosen:
        raise fault(
            "D020",
            f"no row can be held out so that each of {len(sizes)} labels keeps one to train on",
            where="data.stratify",
            help="--set data.stratify=false holds out without regard to labels, or a larger data.test_fraction",
        )
    return chosen


def _refuse_no_labels(conversations: Sequence[Conversation]) -> None:
    """DataError where the answers are hardly ever the same: they are texts, and no labels to hold out by."""
    num_labels = len({conversation.answer() for conversation in conversations})
    if len(conversations) < ROWS_A_LABEL * num_labels:
        place = conversations[0].place
        raise fault(
            "D020",
            f"data.stratify holds out by label, and {len(conversations)} rows have {num_labels} different answers",
            where=place.path if place else "rows",
            help="--set data.stratify=false",
        )


def _nothing_left(conversations: Sequence[Conversation], num_units: int) -> DataError:
    rows = "1 row" if len(conversations) == 1 else f"{len(conversations)} rows"
    grouped = any(conversation.group is not None for conversation in conversations)
    of_what = ("group", "groups") if grouped else ("prompt", "different prompts")
    units = f"1 {of_what[0]}" if num_units == 1 else f"{num_units} {of_what[1]}"
    place = conversations[0].place if conversations else None
    where = place.path if place else "rows"
    message = f"nothing would be left to train on: {rows} with {units}, some of them to be held out"
    return fault("D020", message, where=where, help=ALL_TRAINED)

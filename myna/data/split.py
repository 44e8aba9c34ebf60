"""Which rows are trained on and which are held out: neither a prompt nor a group ever stands on two sides.

Rows are held out in units that stay together: those with the same prompt and, where the recipe groups them
(`data.group_by`), those of the same group. A prompt in two groups makes one unit of both.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from msgspec.structs import replace

from myna.data.check import fault
from myna.data.conversation import Conversation
from myna.data.spool import Chosen, chosen
from myna.errors import DataError

ALL_TRAINED = (
    "--set data.test_fraction=0 --set data.validation_fraction=0 trains on every row and holds nothing out"
)
ROWS_A_LABEL = 2  # with fewer rows to a label on average the answers are no labels


@dataclass(frozen=True)
class Split:
    """Each conversation once, in the order of the file."""

    train: Sequence[Conversation]
    validation: Sequence[Conversation]
    test: Sequence[Conversation]


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
    num_parts = 1 + (test_fraction > 0) + (validation_fraction > 0)
    units = _units(ranks)
    if len(units) < num_parts or test_fraction + validation_fraction >= 1:
        raise _nothing_left(conversations, len(units))
    num_rows = len(conversations)
    if stratify and num_parts > 1:
        _refuse_no_labels(conversations)
        labels = _labels(ranks, conversations)
        test = _by_label(labels, test_fraction, num_rows, num_parts - 1)
        rest = {rank: counts for rank, counts in labels.items() if rank not in test}
        validation = _by_label(rest, validation_fraction, num_rows, 1)
    else:
        test = _held_out(units, test_fraction, num_rows, num_parts - 1)
        rest_of = units.without(test) if validation_fraction else units
        validation = _held_out(rest_of, validation_fraction, num_rows, 1)
    sides: dict[str, array[int]] = {name: array("Q") for name in ("train", "validation", "test")}
    for number, rank in enumerate(ranks):
        side = "test" if rank in test else "validation" if rank in validation else "train"
        sides[side].append(number)
    return Split(**{name: Chosen(conversations, numbers) for name, numbers in sides.items()})


def drop_overlap(
    rows: Sequence[Conversation], others: Sequence[Conversation], system: str | None = None
) -> tuple[Sequence[Conversation], int]:
    """The rows whose prompt (and group, where they have one) does not stand in `others`, and how many were dropped."""
    if not len(others):
        return rows, 0
    elsewhere = {key for conversation in others for key in _keys(conversation, 0, system)}
    kept = chosen(rows, lambda one: elsewhere.isdisjoint(_keys(one, 0, system)))
    return kept, len(rows) - len(kept)


def drop_asked(
    rows: Sequence[Conversation], others: Iterable[Conversation]
) -> tuple[Sequence[Conversation], int]:
    """As `drop_overlap`, whatever the system texts: for rows of files that have system texts of their own."""
    elsewhere = {key for conversation in others for key in _keys(_without_system(conversation), 0, None)}
    kept = chosen(rows, lambda one: elsewhere.isdisjoint(_keys(_without_system(one), 0, None)))
    return kept, len(rows) - len(kept)


def num_asked_earlier(rows: Iterable[Conversation], held_out: Iterable[Conversation]) -> int:
    """How many rows have a prompt of `held_out` before an earlier answer that is learnt: it is told, not taken apart."""
    asked = {_key(_prompt_digest(one.asked_of(), 0)) for one in held_out if not one.is_text}
    return sum(not asked.isdisjoint(_earlier_prompts(one)) for one in rows)


def _earlier_prompts(conversation: Conversation) -> Iterator[int]:
    """The keys of what stands before each learnt answer but the last one."""
    for number, message in enumerate(conversation.messages[:-1]):
        if message.role == "assistant" and message.trained:
            yield _key(_prompt_digest(conversation.first(number), 0))


def _without_system(conversation: Conversation) -> Conversation:
    messages = tuple(message for message in conversation.messages if message.role != "system")
    return replace(conversation, messages=messages)


def _without_ids(turn: dict[str, Any]) -> dict[str, Any]:
    """A turn without the ids of calls: they are drawn anew for each row, and say nothing."""
    kept = {key: value for key, value in turn.items() if key not in ("tool_calls", "tool_call_id")}
    if "tool_calls" in turn:
        kept["tool_calls"] = [call["function"] for call in turn["tool_calls"]]
    return kept


def _keys(conversation: Conversation, seed: int, system: str | None) -> Iterator[int]:
    """What ties a row to others: its prompt, the prompt as `system` makes it, its group."""
    yield _key(_prompt_digest(conversation.asked_of(), seed))
    if system:
        yield _key(_prompt_digest(conversation.with_system(system).asked_of(), seed))
    if conversation.group is not None:
        yield _key(_digest(seed, {"group": conversation.group}))


def _key(digest: str) -> int:
    """The first 8 bytes of a digest, in the order of the whole ones. Two that are alike by chance stay on one side."""
    return int(digest[:16], 16)


def _prompt_digest(prompt: Conversation, seed: int) -> str:
    turns = prompt.as_dicts() if not prompt.uses_tools else [_without_ids(turn) for turn in prompt.as_dicts()]
    return _digest(seed, turns, *prompt.tools)


def _digest(seed: int, *values: object) -> str:
    return hashlib.sha256(json.dumps([seed, *values]).encode()).hexdigest()


def _ranks(conversations: Sequence[Conversation], seed: int, system: str | None) -> array[int]:
    """The rank of each row's unit: the least key in it, of its groups where it has any, else of its prompts."""
    ranks, is_tied = array("Q"), False
    for one in conversations:
        ranks.append(next(_keys(one, seed, None)))
        # its own system text may be `system`, and its prompt that of a row without one
        is_tied = is_tied or one.group is not None or bool(system and one.messages[0].role == "system")
    return _tied_ranks(conversations, seed, system) if is_tied else ranks


def _tied_ranks(conversations: Sequence[Conversation], seed: int, system: str | None) -> array[int]:
    """The ranks where rows of several prompts may be one unit; the keys of all are held for it."""
    keys = [tuple(_keys(conversation, seed, system)) for conversation in conversations]
    parents: dict[int, int] = {}

    def root(key: int) -> int:
        while parents.setdefault(key, key) != key:
            parents[key] = parents[parents[key]]
            key = parents[key]
        return key

    for one in keys:
        for key in one[1:]:
            parents[root(key)] = root(one[0])
    least: dict[int, int] = {}
    for one, conversation in zip(keys, conversations, strict=True):
        rank = one[0] if conversation.group is None else one[-1]
        least[root(one[0])] = min(least.get(root(one[0]), rank), rank)
    return array("Q", (least[root(one[0])] for one in keys))


class _Units:
    """The ranks that there are, in their order, and how many rows each has."""

    def __init__(self, ranks: Any, sizes: Any) -> None:
        self.ranks, self.sizes = ranks, sizes

    def __len__(self) -> int:
        return len(self.ranks)

    def without(self, some: set[int]) -> _Units:
        import numpy as np

        left = ~np.isin(self.ranks, np.array(sorted(some), np.uint64))
        return _Units(self.ranks[left], self.sizes[left])


def _units(ranks: array[int]) -> _Units:
    """Takes 9 bytes of each row where no two are of one unit, some more where there are such."""
    import numpy as np

    ordered = np.sort(np.frombuffer(ranks, np.uint64))
    begins = np.ones(len(ordered), np.bool_)
    begins[1:] = ordered[1:] != ordered[:-1]
    if begins.all():
        return _Units(ordered, begins.view(np.uint8))
    return _Units(ordered[begins], np.diff(np.flatnonzero(begins), append=len(ordered)))


def _labels(ranks: Sequence[int], conversations: Sequence[Conversation]) -> dict[int, Counter[str]]:
    """How many rows each unit has of each label, by rank."""
    found: dict[int, Counter[str]] = {}
    for rank, conversation in zip(ranks, conversations, strict=True):
        found.setdefault(rank, Counter())[conversation.answer()] += 1
    return {rank: found[rank] for rank in sorted(found)}


def _held_out(units: _Units, fraction: float, num_rows: int, num_others: int) -> set[int]:
    """Units by rank as long as their rows fit into `fraction` of all; where none fits, the one with fewest rows.

    `num_others` units are left at least, one for each part of the split that comes after.
    """
    if not fraction * num_rows:
        return set()
    held_out: set[int] = set()
    left = round(fraction * num_rows)
    for rank, size in zip(units.ranks, units.sizes, strict=True):
        if not left or len(held_out) >= len(units) - num_others:
            break
        if size <= left:
            held_out.add(int(rank))
            left -= int(size)
    return held_out or {int(units.ranks[units.sizes.argmin()])}


def _by_label(
    ranked: Mapping[int, Counter[str]], fraction: float, num_rows: int, num_others: int
) -> set[int]:
    """Units by rank as long as the rows of each of their labels fit into that label's part.

    A label's part is `fraction` of its rows, in whole rows, the largest remainders first (Hamilton), so that the parts
    add up to `fraction` of all rows. Of each label one row stays, and one for each later part where there are so many.
    """
    if not fraction:
        return set()
    sizes: Counter[str] = Counter()
    for labels in ranked.values():
        sizes.update(labels)
    of_these = fraction * num_rows / sizes.total()  # of the rows that earlier parts left
    left = {label: int(of_these * size) for label, size in sizes.items()}
    spare = round(of_these * sizes.total()) - sum(left.values())
    for label in sorted(sizes, key=lambda one: (int(of_these * sizes[one]) - of_these * sizes[one], one)):
        if spare > 0 and sizes[label] - left[label] > num_others:
            left[label] += 1
            spare -= 1
    held_out = set()
    for rank, labels in ranked.items():
        fits = all(count <= left[label] and count < sizes[label] for label, count in labels.items())
        if fits:
            held_out.add(rank)
            for label, count in labels.items():
                left[label] -= count
                sizes[label] -= count
    if not held_out:
        raise fault(
            "D020",
            f"no row can be held out so that each of {len(sizes)} labels keeps one to train on",
            where="data.stratify",
            help="--set data.stratify=false holds out without regard to labels, or a larger data.test_fraction",
        )
    return held_out


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
    num_groups = len({one.group for one in conversations if one.group is not None})
    if num_groups > num_units:
        units = f"{num_groups} groups that prompts in several of them tie into {num_units}"
    place = conversations[0].place if conversations else None
    where = place.path if place else "rows"
    message = f"nothing would be left to train on: {rows} with {units}, some of them to be held out"
    return fault("D020", message, where=where, help=ALL_TRAINED)

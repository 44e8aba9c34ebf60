"""From a recipe to the rows of each side: what is trained on, what the validation loss is of, what is held out to test.

data.train ──┬─ data.group_by, data.stratify, a digest of the prompt ─► train · validation · test
data.validation, data.test, where they are given ───────────────────► validation · test
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from myna.data.conversation import Conversation
from myna.data.rows import LoadedRows, load_rows
from myna.data.split import drop_asked, drop_overlap, num_asked_earlier, split_rows
from myna.data.spool import chosen, with_system
from myna.errors import DataError
from myna.recipe import Recipe, is_path
from myna.settings import DataSettings, MixedRows

Say = Callable[[str], None]
# What run.json has of runs whose sides are kept apart after the system text is there, and not before.
SIDES_VERSION = 2


@dataclass(frozen=True)
class Learnt:
    """The training rows of one file, and how often each is seen an epoch."""

    path: str
    rows: Sequence[Conversation]
    weight: float = 1.0


@dataclass(frozen=True)
class Sides:
    """The rows of each side, with their system text, and what was found out about each file by its setting.

    `train` are those of data.train first, then those of each file of data.mix.
    """

    train: tuple[Learnt, ...]
    validation: Sequence[Conversation]
    test: Sequence[Conversation]
    loaded: Mapping[str, LoadedRows]


def row_files(data: DataSettings) -> dict[str, tuple[str, DataSettings]]:
    """Everything that a recipe reads rows from, by the name of its setting, and how each is read."""
    paths = {"train": data.train, "validation": data.validation, "test": data.test}
    files = {name: (path, data) for name, path in paths.items() if path}
    for number, one in enumerate(data.mix, start=1):
        own = {
            "format": one.format,
            "columns": one.columns,
            "system": one.system,
            "group_by": one.group_by,
        }
        files[f"mix.{number}"] = (one.train, data.model_copy(update=own))
    return files


def row_paths(data: DataSettings) -> list[str]:
    return [path for path, _ in row_files(data).values()]


def absolute(data: DataSettings) -> DataSettings:
    """The same with whole paths."""
    whole = {name: _whole(path) for name, (path, _) in row_files(data).items() if "." not in name}
    mix = [one.model_copy(update={"train": _whole(one.train)}) for one in data.mix]
    return data.model_copy(update={**whole, "mix": mix})


def _whole(path: str) -> str:
    return str(Path(path).resolve()) if is_path(path) else path


def read_sides(recipe: Recipe, known: Mapping[str, Any] | None, say: Say) -> Sides:
    """Reads every file of the recipe and keeps its sides apart. `known` is run.json where the run exists.

    Raises DataError where rows cannot be used, or none is left to train on.
    """
    data = recipe.data
    before = known.get("data", {}) if known else {}
    limits = {
        name: None if name in ("validation", "test") else recipe.train.max_rows for name in row_files(data)
    }
    loaded = {
        name: load_rows(path, settings, max_rows=limits[name], known=before.get(name))
        for name, (path, settings) in row_files(data).items()
    }
    for rows in loaded.values():
        for sentence in rows.said:
            say(sentence)
    system = data.system if known is None or known.get("sides") == SIDES_VERSION else None
    sides = _apart(recipe, {name: rows.conversations for name, rows in loaded.items()}, system, say)
    if not sides["train"]:
        raise DataError("no row is left to train on", where=data.train)
    asked = chosen(sides["test"], lambda conversation: conversation.messages[-1].trained)
    if len(asked) < len(sides["test"]):
        say(
            f"{len(sides['test']) - len(asked)} held-out rows end with an answer of weight 0, "
            "which is no answer to measure by"
        )
    sides["test"] = asked
    of_all = {name: with_system(rows, data.system) for name, rows in sides.items()}
    held_out = (of_all["validation"], of_all["test"])
    mixed = [_mixed(one, loaded[f"mix.{n}"], held_out, say) for n, one in enumerate(data.mix, start=1)]
    learnt = (Learnt(data.train, of_all["train"]), *mixed)
    num_earlier = num_asked_earlier(
        chain.from_iterable(one.rows for one in learnt), chain.from_iterable(held_out)
    )
    if num_earlier:
        say(
            f"{num_earlier} training rows have a held-out prompt before an earlier answer: "
            "these questions are not new to the model (data.train_on: last learns no earlier answers)"
        )
    return Sides(learnt, of_all["validation"], of_all["test"], loaded)


def _mixed(
    one: MixedRows, loaded: LoadedRows, held_out: Sequence[Sequence[Conversation]], say: Say
) -> Learnt:
    """The rows of a file of data.mix, without those whose prompt or group is held out."""
    own = with_system(loaded.conversations, one.system)
    rows, num_dropped = drop_asked(own, chain.from_iterable(held_out))
    if num_dropped:
        say(f"{num_dropped} rows of {_name(one.train)} were left out: their prompts are held out")
    if not rows:
        raise DataError("no row is left to train on: all are held out", where=one.train)
    return Learnt(one.train, rows, one.weight)


def _apart(
    recipe: Recipe, given: Mapping[str, Sequence[Conversation]], system: str | None, say: Say
) -> dict[str, Sequence[Conversation]]:
    """The rows of the files as they are given, what stands on two sides left out of the one that learns from it."""
    data = recipe.data
    train, test = given["train"], given.get("test", ())
    validation, num_dropped = drop_overlap(given.get("validation", ()), test, system)
    if num_dropped:
        say(f"{num_dropped} validation rows were left out: their prompts stand in {_name(data.test)} too")
    for path, rows in ((data.test, test), (data.validation, validation)):
        train, num_dropped = drop_overlap(train, rows, system)
        if num_dropped:
            say(f"{num_dropped} training rows were left out: their prompts stand in {_name(path)} too")
    if data.test and (data.validation or not data.validation_fraction):
        return {"train": train, "validation": validation, "test": test}
    split = split_rows(
        train,
        test_fraction=0.0 if data.test else data.test_fraction,
        validation_fraction=0.0 if data.validation else data.validation_fraction,
        seed=recipe.train.seed,
        stratify=data.stratify,
        system=system,
    )
    how = _how(data)
    if not data.test:
        test = split.test
        say(f"{len(test)} of {len(given['train'])} rows are held out (data.test_fraction{how})")
    if not data.validation:
        validation = split.validation
        if validation:
            say(
                f"{len(validation)} of {len(given['train'])} rows are for the validation loss "
                f"(data.validation_fraction{how})"
            )
    if data.stratify:
        _say_labels(split.train, test if not data.test else validation, say)
    return {"train": split.train, "validation": validation, "test": test}


def _name(path: str | None) -> str:
    return Path(path or "").name


def _how(data: DataSettings) -> str:
    return f"{f', by {data.group_by}' if data.group_by else ''}{', of each label' if data.stratify else ''}"


def _say_labels(train: Sequence[Conversation], held_out: Sequence[Conversation], say: Say) -> None:
    """Labels of which no row was held out: there are too few rows of them, or their groups are too large."""
    labels, there = {one.answer() for one in train}, {one.answer() for one in held_out}
    without = len(labels - there)
    if without:
        say(f"{without} of {len(labels)} labels have no row among those held out: too few rows have them")

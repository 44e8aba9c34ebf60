"""Which rows a step has, and how they are laid out: a pure function of recipe, plan and rows, at any step at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from myna.data.epochs import rows_an_epoch
from myna.data.packing import Batch, Step, collate, num_steps_an_epoch
from myna.data.render import Example
from myna.data.token_rows import Picked, lengths_of
from myna.pack_facts import epoch_packs
from myna.prepare import Prepared
from myna.trial import largest_pack

Packs = Sequence[Sequence[Example]]


def planned_steps(prepared: Prepared, first: int) -> Iterator[tuple[int, int, Packs]]:
    """(step, epoch, the step's rows by pack) from step `first` to the last.

    To begin anywhere costs the plan of that step's epoch, not the steps before it.
    """
    plan, settings, examples = prepared.plan, prepared.recipe.train, prepared.examples
    lengths = lengths_of(examples)
    steps_an_epoch = num_steps_an_epoch(rows_an_epoch(prepared.parts), settings.batch_size)
    epoch, planned = -1, list[Step]()
    for step in range(first, plan.num_steps + 1):
        if (step - 1) // steps_an_epoch != epoch:
            epoch = (step - 1) // steps_an_epoch
            planned = epoch_packs(lengths, prepared.parts, settings, plan, epoch=epoch)
        packs = planned[(step - 1) % steps_an_epoch]
        yield step, epoch, [Picked(examples, pack) for pack in packs]


def collate_step(prepared: Prepared, step: int, packs: Packs) -> list[Batch]:
    """The packs of a step as tensors; with dropout each with what its masks are drawn from."""
    is_fast = prepared.plan.path == "fast"
    if is_fast and prepared.recipe.adapter.dropout:
        seed = prepared.recipe.train.seed
        return [collate(list(pack), draw=(seed, step, number)) for number, pack in enumerate(packs)]
    return [collate(list(pack), share=is_fast) for pack in packs]


def first_pack(prepared: Prepared) -> Batch:
    """The first pack of the run's first step, whichever step it goes on from: int8 is made to fit it."""
    _, _, packs = next(planned_steps(prepared, 1))
    return collate(list(packs[0]), share=True)


def largest_pack_from(prepared: Prepared, first: int) -> Batch:
    """Of the packs from step `first` on, the one that takes the most memory."""
    packs = ((step, pack) for step, _, packs in planned_steps(prepared, first) for pack in packs)
    return largest_pack(
        packs,
        lambda step, pack: collate_step(prepared, step, [pack])[0],
        fast=prepared.plan.path == "fast",
    )

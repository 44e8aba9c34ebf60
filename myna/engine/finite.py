"""A loss or a gradient that is not finite: which rows it comes from."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from myna.data.packing import Batch, collate
from myna.data.render import Example
from myna.engine.optim import gradient_norm
from myna.engine.scaling import LossScale, mean_loss
from myna.engine.step import Stepper

SHOWN_ROWS = 6


def rows_at_fault(
    stepper: Stepper,
    packs: Sequence[Sequence[Example]],
    batches: Sequence[Batch],
    gradient_P: torch.Tensor,
    num_targets: int,
    scaling: LossScale | None = None,
) -> str:
    """The rows of a step that was not finite, in words: as few of them as can be told.

    `batches` are the step's packs as they were computed. They are run again, each alone, and then the rows of the first
    that is not finite, each alone and with nothing dropped. `gradient_P` is what the backward adds to; it is zero
    afterwards.
    """

    def is_finite(batch: Batch) -> bool:
        gradient_P.zero_()
        loss = mean_loss(stepper, batch, num_targets, scaling)
        if math.isfinite(float(loss.detach())):
            loss.backward()
            return math.isfinite(gradient_norm(gradient_P))
        return False

    pack = next((p for p, batch in zip(packs, batches, strict=True) if not is_finite(batch)), None)
    alone = [row for row in pack or () if not is_finite(collate([row]))]
    gradient_P.zero_()
    if pack is not None and len(alone) == len(pack) > 1:
        return f"every row of a pack, so rather the adapter than the rows: {_named(alone)}"
    if alone:
        return f"not finite by themselves: {_named(alone)}"
    if pack is not None:
        return f"not finite together: {_named(pack)}"
    return f"the rows of the step: {_named([row for pack in packs for row in pack])}"


def _named(rows: Sequence[Example]) -> str:
    places = sorted({row.place for row in rows if row.place}, key=lambda place: (place.path, place.line))
    more = len(places) - SHOWN_ROWS
    return ", ".join(map(str, places[:SHOWN_ROWS])) + (f" and {more} more" if more > 0 else "")


def all_finite(*numbers: float) -> bool:
    return all(map(math.isfinite, numbers))

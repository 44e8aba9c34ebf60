"""The validation loss: the mean over the target tokens of rows that are neither trained on nor in the test.

It is taken at every checkpoint but one that a signal asked for, on the way that training takes, without dropout and without
a gradient.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from myna.data.packing import collate, plan_packs
from myna.engine.step import Stepper
from myna.prepare import Prepared
from myna.trial import room_required

StopAsked = Callable[[], int | None]


def validation_loss(
    prepared: Prepared, model: Any, stepper: Stepper, stop_asked: StopAsked = lambda: None
) -> float | None:
    """The sum of the loss over all target tokens of the validation rows, divided by their count.

    None where `stop_asked` names a signal before the last of them: one who is asked to stop has no time for it.
    """
    examples, plan = prepared.validation, prepared.plan
    steps = plan_packs(
        [len(example.input_ids_T) for example in examples],
        seed=prepared.recipe.train.seed,
        epoch=0,
        batch_size=prepared.recipe.train.batch_size,
        pack_tokens=plan.pack_tokens,
    )
    loss_sum, num_targets = 0.0, 0
    with _at_rest(model), room_required(plan):
        for pack in (pack for step in steps for pack in step):
            if stop_asked() is not None:
                return None
            batch = collate([examples[row] for row in pack], share=plan.path == "fast")
            loss_sum += float(stepper.loss(batch))
            num_targets += len(batch.targets_N)
    return loss_sum / num_targets


@contextlib.contextmanager
def _at_rest(model: Any) -> Iterator[None]:
    """Inside, nothing is dropped and no gradient is made; the reference path asks the model whether it trains."""
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train()

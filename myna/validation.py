"""The validation loss: the mean over the target tokens of rows that are neither trained on nor in the test.

It is taken at every checkpoint, on the way that training takes, without dropout and without a gradient.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from myna.data.packing import collate, plan_packs
from myna.engine.step import Stepper
from myna.metrics import append_line, read_lines
from myna.prepare import Prepared
from myna.trial import room_required


def validation_due(prepared: Prepared, step: int) -> bool:
    """Whether a step's validation loss is to be taken: at checkpoints by their interval, and at the end."""
    every, last = prepared.recipe.train.save_every_steps, prepared.plan.num_steps
    return bool(prepared.validation) and (step % every == 0 or step == last)


def validate(prepared: Prepared, step: int, model: Any, stepper: Stepper) -> float:
    """Takes the loss and adds its line to metrics.jsonl: {"step": …, "validation_loss": …}."""
    loss = validation_loss(prepared, model, stepper)
    append_line(prepared.run.metrics_path, {"step": step, "validation_loss": loss})
    return loss


def is_validated(prepared: Prepared, step: int) -> bool:
    """Whether the step's line is there; a process may have been stopped between its checkpoint and that."""
    lines = read_lines(prepared.run.metrics_path)
    return any(line.get("step") == step and "validation_loss" in line for line in lines)


def validation_loss(prepared: Prepared, model: Any, stepper: Stepper) -> float:
    """The sum of the loss over all target tokens of the validation rows, divided by their count."""
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

"""One optimizer step: its packs forward and backward, the gradient clipped; where it is not finite, the rows named."""

from __future__ import annotations

from collections.abc import Sequence

from myna.data.packing import Batch
from myna.engine.finite import all_finite, rows_at_fault
from myna.engine.optim import FlatAdapter
from myna.engine.scaling import LossScale, mean_loss
from myna.engine.step import Stepper
from myna.errors import CheckFailed
from myna.prepare import Prepared
from myna.saver import last_good_checkpoint
from myna.steps import Packs


def take_step(
    prepared: Prepared,
    step: int,
    stepper: Stepper,
    adapter: FlatAdapter,
    packs: Packs,
    batches: Sequence[Batch],
    rate: float,
    scaling: LossScale | None,
) -> tuple[float, float | None]:
    """One optimizer update; returns loss and norm of the gradient. CheckFailed, with no update, where one is not finite.

    With `scaling`, a gradient that is not finite only skips the step, and its norm is None, unless the scale is the least.
    """
    num_targets = sum(len(batch.targets_N) for batch in batches)
    loss_sum = 0.0
    scale = scaling.scale if scaling else 1.0
    for batch in batches:
        loss = mean_loss(stepper, batch, num_targets, scaling)
        loss_sum += float(loss.detach()) / scale
        if not all_finite(loss_sum):
            break
        loss.backward()
    if scaling:
        adapter.gradient_P.div_(scale)
    grad_norm = adapter.clip(prepared.recipe.train.max_grad_norm)
    if scaling and not scaling.is_least and all_finite(loss_sum) and not all_finite(grad_norm):
        adapter.gradient_P.zero_()
        return loss_sum, None
    if not all_finite(loss_sum, grad_norm):
        rows = rows_at_fault(stepper, packs, batches, adapter.gradient_P, num_targets, scaling)
        raise CheckFailed(
            f"{_not_finite(step, loss_sum, grad_norm)}; {rows}",
            where=str(prepared.run.path),
            help=f"look at these rows, or take a smaller train.learning_rate (this step's was {rate:.2g}) in a new run; "
            + ("fp16 holds nothing above 65,504, fp32 does (model.dtype); " if scaling else "")
            + last_good_checkpoint(prepared.run),
            code="loss",
        )
    adapter.step(rate)
    stepper.refresh()
    return loss_sum, grad_norm


def _not_finite(step: int, loss: float, grad_norm: float) -> str:
    if not all_finite(loss):  # then no gradient was made
        return f"the loss of step {step} is {loss}"
    return f"the norm of the gradient of step {step} is {grad_norm}, its loss {loss:.4g}"

"""Dynamic loss scaling for fp16: what would be too small for it is multiplied on the way back, and divided at the end.

Micikevicius et al. 2018, "Mixed Precision Training", section 3.2; the constants are those of torch.amp.GradScaler. fp16
holds nothing above 65,504 and nothing below 6e-8: a gradient that overflows halves the scale and its step is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from myna.data.packing import Batch
from myna.engine.step import Stepper

FIRST_SCALE = 2.0**16
LEAST_SCALE = 1.0  # a gradient that is too large unscaled is no matter of scaling
GOOD_STEPS = 2000  # finite steps in a row, after which the scale is doubled


@dataclass(frozen=True)
class LossScale:
    """The whole state: the scale, a power of two, and the finite steps since it last changed."""

    scale: float
    good_steps: int = 0

    @property
    def is_least(self) -> bool:
        return self.scale <= LEAST_SCALE

    def after(self, *, finite: bool) -> LossScale:
        """The state after a step whose gradient was finite, or was not."""
        if not finite:
            return LossScale(max(LEAST_SCALE, self.scale / 2))
        if self.good_steps + 1 < GOOD_STEPS:
            return LossScale(self.scale, self.good_steps + 1)
        return LossScale(self.scale * 2)

    def facts(self) -> dict[str, float]:
        """What a checkpoint keeps of it."""
        return asdict(self)


def loss_scale_of(dtype: str, facts: Mapping[str, Any] | None = None) -> LossScale | None:
    """Of a run in this number format, as a checkpoint has it or at its beginning; None where nothing is to be scaled."""
    if dtype != "fp16":
        return None
    return LossScale(FIRST_SCALE) if facts is None else LossScale(**facts["loss_scale"])


def mean_loss(
    stepper: Stepper, batch: Batch, num_targets: int, scaling: LossScale | None = None
) -> torch.Tensor:
    """A pack's part of the mean over the step's target tokens; with `scaling` times the scale, and its gradient too.

    The factor goes into the loss itself: applied to the finished loss it would come too late, after the gradient of the
    logits was rounded to fp16.
    """
    if scaling is None:
        return stepper.loss(batch) / num_targets
    return stepper.loss(batch, scaling.scale / num_targets)

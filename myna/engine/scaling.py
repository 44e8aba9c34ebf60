"""Dynamic loss scaling for fp16: what would be too small for it is multiplied on the way back, and divided at the end.

Micikevicius et al. 2018, "Mixed Precision Training", section 3.2; the constants are those of torch.amp.GradScaler. fp16
holds nothing above 65,504 and nothing below 6e-8: a gradient that overflows halves the scale and its step is left out.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch

from myna.data.packing import Batch
from myna.engine.step import Stepper
from myna.state import State

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


def loss_scale_of(dtype: str) -> LossScale | None:
    """Of a run in this number format at its beginning; None where nothing is to be scaled."""
    return LossScale(FIRST_SCALE) if dtype == "fp16" else None


@dataclass
class Scaling:
    """The loss scale as it goes from step to step, and as checkpoints keep it."""

    now: LossScale | None

    def note_step(self, *, finite: bool) -> None:
        if self.now is not None:
            self.now = self.now.after(finite=finite)

    def give_state(self) -> State:
        return State(facts={} if self.now is None else asdict(self.now))

    def take_state(self, state: State) -> None:
        """ValueError where one of the two is scaled and the other is not."""
        if (self.now is None) != (not state.facts):
            raise ValueError(f"the loss scale is {self.now} here and {dict(state.facts)} there")
        self.now = LossScale(**state.facts) if state.facts else None


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

"""The optimizer and the learning rate: AdamW on the adapter, and a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from myna.recipe import TrainSettings

# Peak learning rate where the recipe names none: tried on SmolLM2-135M (width 576), 1e-3 for LoRA; the power takes it
# to the field's usual 2e-4 at width 4096. Larger models have not been tried here.
TRIED_RATE, TRIED_WIDTH, RATE_POWER = 1e-3, 576, 0.82


def default_learning_rate(hidden_size: int) -> float:
    """The peak for a model of this width, rounded to two digits."""
    rate = TRIED_RATE * (TRIED_WIDTH / hidden_size) ** RATE_POWER
    return float(f"{rate:.1e}")


def lr_at(step: int, num_steps: int, settings: TrainSettings) -> float:
    """Learning rate of step 1 … `num_steps`: a linear warm-up, then linear or cosine to zero, or constant."""
    assert settings.learning_rate is not None and 1 <= step <= num_steps
    warmup = min(settings.warmup_steps, max(0, num_steps - 1))
    if step <= warmup:
        return settings.learning_rate * step / (warmup + 1)
    left = (num_steps - step + 1) / (num_steps - warmup)
    factor = {
        "linear": left,
        "cosine": 0.5 * (1 - math.cos(math.pi * left)),
        "constant": 1.0,
    }[settings.schedule]
    return settings.learning_rate * factor


def make_optimizer(parameters: Iterable[torch.nn.Parameter], settings: TrainSettings) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019) over the adapter's parameters."""
    return torch.optim.AdamW(parameters, lr=0.0, weight_decay=settings.weight_decay, foreach=True)

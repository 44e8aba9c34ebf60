"""The optimizer and the learning rate: AdamW over the adapter as one flat tensor, and a pure function of the step.

Shapes: P numbers of the adapter, its matrices first, then what has one dimension.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from myna.settings import TrainSettings

# Peak learning rate where the recipe names none: tried on SmolLM2-135M (width 576), 1e-3 for LoRA; the power takes it
# to the field's usual 2e-4 at width 4096. Larger models have not been tried here.
TRIED_RATE, TRIED_WIDTH, RATE_POWER = 1e-3, 576, 0.82

WSD_DECAY = 0.2  # the part of the steps in which a WSD schedule falls
NORM_BLOCK = 1 << 14  # numbers summed at once: over millions in one go float32 loses the fourth digit
CLIP_EPSILON = 1e-6  # as torch's clip_grad_norm_ has it


def default_learning_rate(hidden_size: int) -> float:
    """The peak for a model of this width, rounded to two digits."""
    rate = TRIED_RATE * (TRIED_WIDTH / hidden_size) ** RATE_POWER
    return float(f"{rate:.1e}")


def lr_at(step: int, num_steps: int, settings: TrainSettings) -> float:
    """Learning rate of step 1 … `num_steps`: a linear warm-up, then what `schedule` says.

    linear · cosine     to zero
    constant            the peak
    wsd                 the peak, then linear to zero in the last 20 % of the steps (warm-up, stable, decay: Hu et al. 2024,
                        "MiniCPM", section 4)
    """
    assert settings.learning_rate is not None and 1 <= step <= num_steps
    warmup = min(settings.warmup_steps, max(0, num_steps - 1))
    if step <= warmup:
        return settings.learning_rate * step / (warmup + 1)
    to_come = num_steps - step + 1
    left = to_come / (num_steps - warmup)
    decay = min(max(1, round(WSD_DECAY * num_steps)), num_steps - warmup)
    factor = {
        "linear": left,
        "cosine": 0.5 * (1 - math.cos(math.pi * left)),
        "constant": 1.0,
        "wsd": min(1.0, to_come / (decay + 1)),
    }[settings.schedule]
    return settings.learning_rate * factor


@dataclass(frozen=True)
class FlatAdapter:
    """The adapter's parameters as views of one flat tensor, their gradients of another, and the optimizer over it.

    A backward adds to the gradients in place; they are set to zero, never to None.
    """

    parameters: Mapping[str, torch.nn.Parameter]
    gradient_P: torch.Tensor
    optimizer: torch.optim.AdamW
    state: Mapping[
        torch.nn.Parameter, dict[str, torch.Tensor]
    ]  # by parameter, as torch's optimizers have it; views

    def clip(self, limit: float) -> float:
        """The gradient's norm; where it is above `limit` (0: off) the gradient is scaled down to it."""
        norm = gradient_norm(self.gradient_P)
        if limit and limit < norm < math.inf:
            self.gradient_P.mul_(limit / (norm + CLIP_EPSILON))
        return norm

    def step(self, rate: float) -> None:
        """One AdamW update at this learning rate, and the gradient back to zero."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.gradient_P.zero_()


def flatten_adapter(parameters: Mapping[str, torch.nn.Parameter], settings: TrainSettings) -> FlatAdapter:
    """Moves the parameters into one flat tensor and puts AdamW (Loshchilov & Hutter 2019) over it.

    The parameter objects stay the same. Decay is on matrices alone. One tensor is updated twenty times faster than the
    some hundred small ones of an adapter, each of whose numbers it treats alike.
    """
    ordered = sorted(parameters.items(), key=lambda item: item[1].ndim < 2)
    like = ordered[0][1]
    assert all(p.dtype == like.dtype and p.device == like.device for _, p in ordered)
    values_P = torch.cat([parameter.detach().flatten() for _, parameter in ordered])
    gradient_P, first_P, second_P = (torch.zeros_like(values_P) for _ in range(3))
    num_matrix = sum(parameter.numel() for _, parameter in ordered if parameter.ndim >= 2)
    parts = (slice(0, num_matrix), settings.weight_decay), (slice(num_matrix, len(values_P)), 0.0)
    counts = [torch.zeros((), dtype=torch.float32, device=like.device) for _ in parts]
    groups: list[dict[str, Any]] = []
    held: dict[torch.Tensor, dict[str, torch.Tensor]] = {}
    for (part, decay), count in zip(parts, counts, strict=True):
        leaf = torch.nn.Parameter(values_P[part])
        if leaf.numel():
            leaf.grad = gradient_P[part]
            groups.append({"params": [leaf], "weight_decay": decay})
            held[leaf] = {"step": count, "exp_avg": first_P[part], "exp_avg_sq": second_P[part]}
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(settings.betas[0], settings.betas[1]), fused=True)
    optimizer.state.update(held)
    state, start = {}, 0
    for _, parameter in ordered:
        part, count = slice(start, start + parameter.numel()), counts[int(parameter.ndim < 2)]
        parameter.data = values_P[part].view_as(parameter)
        parameter.grad = gradient_P[part].view_as(parameter)
        moments = {"exp_avg": first_P[part], "exp_avg_sq": second_P[part]}
        state[parameter] = {"step": count} | {k: v.view_as(parameter) for k, v in moments.items()}
        start = part.stop
    return FlatAdapter(dict(parameters), gradient_P, optimizer, state)


def gradient_norm(gradient_P: torch.Tensor) -> float:
    """The 2-norm, to seven digits in float32."""
    blocks = [torch.linalg.vector_norm(block) for block in gradient_P.split(NORM_BLOCK)]
    return float(torch.linalg.vector_norm(torch.stack(blocks).double()))

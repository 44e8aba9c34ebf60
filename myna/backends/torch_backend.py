"""torch over a transformers model: the base, base + adapter, or merged, in one process.

Shapes: B rows answered together · L longest of them so far · V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from myna.backends import GeneratedToken, Sampling

ROWS_TOGETHER = 64
TOKENS_TOGETHER = 16_384  # keys and values of so many tokens are kept: 0.75 GB for SmolLM2-135M in float32
REPACK_BELOW = 0.75  # when fewer of a batch's rows are still being answered, the others leave the cache


@dataclass(frozen=True)
class TorchBackend:
    """A model behind the Backend protocol; `model` is a transformers causal LM or a peft model of one."""

    model: Any
    name: str

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Iterator[GeneratedToken]:
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        longest = max((len(prompt) for prompt in prompts), default=0) + sampling.max_tokens
        together = max(1, min(ROWS_TOGETHER, TOKENS_TOGETHER // longest)) if longest else 1
        for start in range(0, len(order), together):
            rows = order[start : start + together]
            yield from _generate_batch(self.model, [(i, list(prompts[i])) for i in rows], sampling)

    def score(self, token_ids: Sequence[int]) -> npt.NDArray[np.float32]:
        device = next(self.model.parameters()).device
        with torch.inference_mode():
            logits = self.model(torch.tensor([list(token_ids)], device=device), use_cache=False).logits[0]
            scores: npt.NDArray[np.float32] = logits.float().log_softmax(-1).cpu().numpy()
        return scores

    def close(self) -> None:
        """Nothing to end: the model is the caller's."""


@dataclass
class _Row:
    """One answer under way: the prompt's index, all its ids so far, its own random generator."""

    index: int
    ids: list[int]
    num_new: int
    generator: torch.Generator


def _generate_batch(
    model: Any, prompts: Sequence[tuple[int, list[int]]], sampling: Sampling
) -> Iterator[GeneratedToken]:
    """Left-padded prompts answered together, one token a row a turn; rows leave when they are done."""
    from transformers import DynamicCache

    device = next(model.parameters()).device
    rows = [
        _Row(index, ids, 0, torch.Generator().manual_seed(sampling.seed + index)) for index, ids in prompts
    ]
    longest = max(len(row.ids) for row in rows)
    input_ids_BL = torch.zeros(len(rows), longest, dtype=torch.long)
    mask_BL = torch.zeros(len(rows), longest, dtype=torch.long)
    for number, row in enumerate(rows):
        input_ids_BL[number, longest - len(row.ids) :] = torch.tensor(row.ids)
        mask_BL[number, longest - len(row.ids) :] = 1
    input_ids_BL, mask_BL = input_ids_BL.to(device), mask_BL.to(device)
    position_ids_BL = (mask_BL.cumsum(-1) - 1).clamp(min=0)
    cache = DynamicCache(config=model.config)
    active: list[_Row | None] = list(rows)
    while True:
        with torch.inference_mode():
            logits_BV = model(
                input_ids=input_ids_BL,
                attention_mask=mask_BL,
                position_ids=position_ids_BL,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]
        next_ids = torch.zeros(len(active), 1, dtype=torch.long)
        for number, answer in enumerate(active):
            if answer is None:
                continue
            token = choose_token(logits_BV[number].float().cpu(), answer.ids, sampling, answer.generator)
            if token in sampling.stop_ids:
                active[number] = None
                continue
            answer.ids.append(token)
            answer.num_new += 1
            next_ids[number] = token
            yield GeneratedToken(answer.index, token)
            if answer.num_new >= sampling.max_tokens:
                active[number] = None
        kept = [number for number, row in enumerate(active) if row is not None]
        if not kept:
            return
        if len(kept) < REPACK_BELOW * len(active):
            index = torch.tensor(kept, device=device)
            cache.batch_select_indices(index)
            active = [active[number] for number in kept]
            next_ids, mask_BL, position_ids_BL = next_ids[kept], mask_BL[index], position_ids_BL[index]
        input_ids_BL = next_ids.to(device)
        mask_BL = torch.cat([mask_BL, mask_BL.new_ones(len(active), 1)], dim=1)
        position_ids_BL = position_ids_BL[:, -1:] + 1


def choose_token(
    logits_V: torch.Tensor, ids: Sequence[int], sampling: Sampling, generator: torch.Generator
) -> int:
    """One token by llama.cpp's order: repeat penalty over the last tokens, then top-p, then temperature.

    The penalty is Keskar et al. 2019 (CTRL): positive logits divided by it, negative ones multiplied.
    """
    if sampling.repeat_penalty != 1.0 and sampling.repeat_last_n:
        recent = torch.tensor(sorted(set(ids[-sampling.repeat_last_n :])))
        seen = logits_V[recent]
        logits_V = logits_V.clone()
        logits_V[recent] = torch.where(
            seen > 0, seen / sampling.repeat_penalty, seen * sampling.repeat_penalty
        )
    if sampling.temperature <= 0:
        return int(logits_V.argmax())
    probabilities, order = logits_V.softmax(-1).sort(descending=True)
    before = probabilities.cumsum(-1) - probabilities
    kept = int((before < sampling.top_p).sum().clamp(min=1))
    weights = (logits_V[order[:kept]] / sampling.temperature).softmax(-1)
    return int(order[torch.multinomial(weights, 1, generator=generator)])

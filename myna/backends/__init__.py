"""What answers: one protocol over token ids, two methods. Backends never see messages: no template to disagree on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. temperature 0 is greedy: the likeliest token after the repeat penalty."""

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    repeat_penalty: float = 1.0
    repeat_last_n: int = 64
    seed: int = 0
    stop_ids: frozenset[int] = frozenset()


@dataclass(frozen=True)
class GeneratedToken:
    """One new token of the answer to `prompts[prompt_index]`. A stop id ends an answer and is not yielded."""

    prompt_index: int
    token_id: int


class Backend(Protocol):
    """Something that continues and scores token ids.

    `generate` streams tokens of all prompts, interleaved in any order; closing the iterator stops the work.
    `score` gives, for one sequence of T ids, float32 log-probabilities [T, V]: row t is the distribution of
    the token after `token_ids[: t + 1]`.
    """

    @property
    def name(self) -> str: ...

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Iterator[GeneratedToken]: ...

    def score(self, token_ids: Sequence[int]) -> npt.NDArray[np.float32]: ...

    def close(self) -> None: ...


def complete(backend: Backend, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[list[int]]:
    """The whole answers, in the order of `prompts`."""
    answers: list[list[int]] = [[] for _ in prompts]
    for token in backend.generate(prompts, sampling):
        answers[token.prompt_index].append(token.token_id)
    return answers

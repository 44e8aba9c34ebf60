"""Held-out rows answered by a backend and scored: the same rows, the same prompts, greedy, for every model of a run."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from myna.backends import Backend, Sampling
from myna.data.conversation import Conversation
from myna.data.render import ChatTokenizer, render_prompt
from myna.evaluate.calls import answer_ids, comparable
from myna.evaluate.scorers import score_answers

LONGEST_DEFAULT = 512


@dataclass(frozen=True)
class Answered:
    """One model's answers in the order of the rows, and how fast it gave them (new tokens a second, prompts included).

    `scored` are the answers as they are compared with the expected ones: calls of functions by name and arguments.
    """

    answers: tuple[str, ...]
    scored: tuple[str, ...]
    num_tokens: int
    seconds: float

    @property
    def tokens_per_s(self) -> float:
        return round(self.num_tokens / self.seconds, 1) if self.seconds else 0.0


def answer_tokens(rows: Sequence[Conversation], tokenizer: ChatTokenizer) -> int:
    """How many tokens an answer may have: the longest expected one and a quarter more, at most 512.

    An answer longer than that is cut and scored as it is; `evaluate.max_tokens` allows longer ones.
    """
    longest = max((_expected_tokens(row, tokenizer) for row in rows), default=0)
    return min(longest + longest // 4 + 8, LONGEST_DEFAULT)


def _expected_tokens(row: Conversation, tokenizer: ChatTokenizer) -> int:
    if row.messages[-1].calls:
        return len(answer_ids(row, tokenizer))
    return len(tokenizer.encode_said(row.answer()))


def answer_rows(
    backend: Backend,
    rows: Sequence[Conversation],
    tokenizer: ChatTokenizer,
    max_tokens: int,
    advance: Callable[[], None] = lambda: None,
) -> Answered:
    """Greedy answers to every row up to its last turn; `advance` is called once a finished or started row."""
    prompts = [render_prompt(row.prompt(), tokenizer) for row in rows]
    # the turns that are calls as the template writes them: some end with a token of their own
    written = {n: answer_ids(row, tokenizer) for n, row in enumerate(rows) if row.messages[-1].calls}
    stop_ids = tokenizer.stop_ids | {ids[-1] for ids in written.values()}
    sampling = Sampling(max_tokens=max_tokens, stop_ids=stop_ids)
    answers: list[list[int]] = [[] for _ in prompts]
    started = time.perf_counter()
    for token in backend.generate(prompts, sampling):
        if not answers[token.prompt_index]:
            advance()
        answers[token.prompt_index].append(token.token_id)
    seconds = time.perf_counter() - started
    texts = tuple(tokenizer.decode(ids) for ids in answers)
    scored = (
        comparable(text, row, tokenizer.decode(written.get(n, ())))
        for n, (text, row) in enumerate(zip(texts, rows, strict=True))
    )
    return Answered(texts, tuple(scored), sum(len(ids) for ids in answers), seconds)


def result_of(answered: Answered, rows: Sequence[Conversation], *, num_bytes: int) -> dict[str, Any]:
    """The entry of evaluation.json for one model."""
    scores = score_answers(answered.scored, [row.answer() for row in rows])
    return {
        **scores.to_json(),
        "mb": round(num_bytes / 1e6, 1),
        "tokens_per_s": answered.tokens_per_s,
        "seconds": round(answered.seconds, 1),
    }

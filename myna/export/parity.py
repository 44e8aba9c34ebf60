"""Is the file the model? Each .gguf file against merged, over held-out tokens, through the runtime that will run it.

Shapes: T tokens of a row · V vocabulary. Row t of a score is the distribution of token t + 1.

    mean KL      Σ p_merged (log p_merged - log p_file), mean over tokens      (Kullback & Leibler 1951)
    same top     share of tokens whose likeliest next token is the same

Gated over target tokens (what the model was taught to say); all tokens are reported beside them. Token ids of
rendered conversations must be equal through the tokenizer and through llama.cpp.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from myna.backends import Backend
from myna.data.conversation import Conversation
from myna.data.render import IGNORE, ChatTokenizer, Example

# Mean KL over target tokens that a file may not exceed. Measured on SmolLM2-135M tuned on orders: docs/export.md.
# A type that is not listed is measured and reported, and passes: its quality is the user's choice.
KL_BOUNDS: Mapping[str, float] = {
    "F32": 0.001,
    "F16": 0.001,
    "BF16": 0.005,
    "Q8_0": 0.01,
    "Q6_K": 0.03,
    "Q5_K_M": 0.1,
    "Q5_K_S": 0.1,
    "Q4_K_M": 0.2,
    "Q4_K_S": 0.2,
    "Q4_0": 0.4,
}

ENOUGH_TOKENS = 1000


@dataclass(frozen=True)
class FileParity:
    """One file against merged. `*_all` count every position, the others target tokens only."""

    mean_kl: float
    same_top: float
    mean_kl_all: float
    same_top_all: float
    num_targets: int
    num_tokens: int
    bound: float | None

    @property
    def passes(self) -> bool:
        return self.bound is None or self.mean_kl <= self.bound

    def as_json(self) -> dict[str, Any]:
        return {
            "mean_kl": self.mean_kl,
            "same_top": self.same_top,
            "mean_kl_all": self.mean_kl_all,
            "same_top_all": self.same_top_all,
            "num_targets": self.num_targets,
            "num_tokens": self.num_tokens,
            "bound": self.bound,
            "verdict": "pass" if self.passes else "fail",
        }


def choose_rows(examples: Sequence[Example], num_tokens: int = ENOUGH_TOKENS) -> list[Example]:
    """The first rows that together have at least `num_tokens` tokens (all, where they have fewer)."""
    chosen: list[Example] = []
    total = 0
    for example in examples:
        if total >= num_tokens:
            break
        chosen.append(example)
        total += len(example.input_ids_T)
    return chosen


def compare_files(
    merged: Backend,
    files: Mapping[str, Backend],
    rows: Sequence[Example],
    advance: Callable[[], None] = lambda: None,
) -> dict[str, FileParity]:
    """Every file (file type → backend) against merged over the same rows, row by row: no logits are kept."""
    sums = {name: np.zeros(4) for name in files}  # KL and same top over targets, then over all
    num_targets = num_tokens = 0
    for row in rows:
        ids = [int(i) for i in row.input_ids_T]
        is_target_T = row.labels_T[1:] != IGNORE
        num_targets += int(is_target_T.sum())
        num_tokens += len(is_target_T)
        reference_TV = merged.score(ids)[:-1]
        for name, backend in files.items():
            kl_T, same_T = divergence(reference_TV, backend.score(ids)[:-1])
            sums[name] += (kl_T[is_target_T].sum(), same_T[is_target_T].sum(), kl_T.sum(), same_T.sum())
        advance()
    return {
        name: FileParity(
            mean_kl=float(total[0] / num_targets),
            same_top=float(total[1] / num_targets),
            mean_kl_all=float(total[2] / num_tokens),
            same_top_all=float(total[3] / num_tokens),
            num_targets=num_targets,
            num_tokens=num_tokens,
            bound=KL_BOUNDS.get(name),
        )
        for name, total in sums.items()
    }


def divergence(
    reference_TV: npt.NDArray[np.float32], other_TV: npt.NDArray[np.float32]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """(KL of reference to other [T], same likeliest token [T]) from log-probabilities."""
    kl_T = (np.exp(reference_TV) * (reference_TV - other_TV)).sum(axis=1, dtype=np.float64)
    return kl_T, reference_TV.argmax(axis=1) == other_TV.argmax(axis=1)


def first_token_difference(
    conversations: Sequence[Conversation], tokenizer: ChatTokenizer, tokenize: Callable[[str], list[int]]
) -> str | None:
    """The first rendered conversation whose ids differ between the tokenizer and llama.cpp, as a sentence; else None."""
    for conversation in conversations:
        text = tokenizer.render_text(conversation, add_generation_prompt=False)
        ours, theirs = tokenizer.encode(text), tokenize(text)
        if ours != theirs:
            at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), len(ours))
            return (
                f"token {at} of a rendered conversation is {ours[at : at + 3]} through the tokenizer "
                f"and {theirs[at : at + 3]} through llama.cpp ({conversation.place})"
            )
    return None

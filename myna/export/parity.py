"""Is the file the model? Each .gguf file against merged, over held-out tokens, through the runtime that will run it.

Shapes: T tokens of a row · V vocabulary. Row t of a score is the distribution of token t + 1.

    mean KL      Σ p_merged (log p_merged - log p_file), mean over tokens      (Kullback & Leibler 1951)
    same top     share of tokens whose likeliest next token is the same
    lost top     share of tokens whose likeliest next token is another, that merged finds less than half as likely:
                 where merged itself can hardly choose between two, the other one is no loss

Gated over target tokens (what the model was taught to say); all tokens are reported beside them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from myna.backends import Backend
from myna.data.render import IGNORE, Example
from myna.interval import wilson_interval


@dataclass(frozen=True)
class Bound:
    """Over target tokens: mean KL at most, share of lost top tokens at most."""

    mean_kl: float
    lost_top: float


# Several times what was measured: docs/export.md says on what, and what llama.cpp published.
BOUNDS: Mapping[str, Bound] = {
    "F32": Bound(0.001, 0.005),
    "F16": Bound(0.001, 0.005),
    "BF16": Bound(0.005, 0.01),
    "Q8_0": Bound(0.02, 0.02),
    "Q6_K": Bound(0.05, 0.04),
    "Q5_K_M": Bound(0.35, 0.15),
    "Q5_K_S": Bound(0.4, 0.15),
    "Q5_1": Bound(0.5, 0.2),
    "Q5_0": Bound(0.3, 0.15),
    "Q4_K_M": Bound(0.25, 0.12),
    "Q4_K_S": Bound(0.3, 0.15),
    "Q4_1": Bound(0.4, 0.2),
    "Q4_0": Bound(0.8, 0.35),
    "IQ4_NL": Bound(0.6, 0.3),
    "IQ4_XS": Bound(0.6, 0.3),
    "Q3_K_L": Bound(0.6, 0.25),
    "Q3_K_M": Bound(0.6, 0.25),
    "Q3_K_S": Bound(1.1, 0.4),
    "Q2_K": Bound(1.5, 0.4),
    "Q2_K_S": Bound(1.5, 0.4),
}

ENOUGH_TOKENS = 1000
ENOUGH_TARGETS = 300


@dataclass(frozen=True)
class FileParity:
    """One file against merged. `*_all` count every position, the others target tokens only."""

    mean_kl: float
    same_top: float
    mean_kl_all: float
    same_top_all: float
    num_targets: int
    num_tokens: int
    bound: float
    lost_top: float
    lost_top_bound: float

    @property
    def failures(self) -> list[str]:
        """Which bound it is beyond, in words; none where it passes."""
        failures = []
        if not self.mean_kl <= self.bound:
            failures.append(f"mean KL {self.mean_kl:.4f} is beyond {self.bound}")
        # few target tokens say little: what counts is whether so many can be lost by chance
        lowest = wilson_interval(round(self.lost_top * self.num_targets), self.num_targets)[0]
        if not lowest <= self.lost_top_bound:
            failures.append(
                f"{self.lost_top:.1%} of top tokens are lost, at most {self.lost_top_bound:.0%} may be"
            )
        return failures

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def choose_rows(
    examples: Iterable[Example], num_tokens: int = ENOUGH_TOKENS, num_targets: int = 0
) -> list[Example]:
    """The first rows that together have at least so many tokens and targets (all, where they have fewer)."""
    chosen: list[Example] = []
    tokens = targets = 0
    for example in examples:
        if tokens >= num_tokens and targets >= num_targets:
            break
        chosen.append(example)
        tokens += len(example.input_ids_T)
        targets += example.num_targets
    return chosen


def compare_file(
    reference: Backend,
    file: Backend,
    file_type: str,
    rows: Sequence[Example],
    advance: Callable[[], None] = lambda: None,
) -> FileParity:
    """A file against what it was made from, row by row: no logits are kept."""
    sums = np.zeros(5)  # KL, same, lost top over targets; KL, same over all
    num_targets = num_tokens = 0
    for row in rows:
        ids = [int(i) for i in row.input_ids_T]
        is_target_T = row.labels_T[1:] != IGNORE
        num_targets += int(is_target_T.sum())
        num_tokens += len(is_target_T)
        kl_T, same_T, lost_T = divergence(reference.score(ids)[:-1], file.score(ids)[:-1])
        targets = (kl_T[is_target_T].sum(), same_T[is_target_T].sum(), lost_T[is_target_T].sum())
        sums += (*targets, kl_T.sum(), same_T.sum())
        advance()
    bound = BOUNDS[file_type]
    return FileParity(
        mean_kl=float(sums[0] / num_targets),
        same_top=float(sums[1] / num_targets),
        mean_kl_all=float(sums[3] / num_tokens),
        same_top_all=float(sums[4] / num_tokens),
        num_targets=num_targets,
        num_tokens=num_tokens,
        bound=bound.mean_kl,
        lost_top=float(sums[2] / num_targets),
        lost_top_bound=bound.lost_top,
    )


def divergence(
    reference_TV: npt.NDArray[np.float32], other_TV: npt.NDArray[np.float32]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """(KL of reference to other, same likeliest token, lost likeliest token) [T] each, from log-probabilities."""
    kl_T = (np.exp(reference_TV) * (reference_TV - other_TV)).sum(axis=1, dtype=np.float64)
    top_T, other_top_T = reference_TV.argmax(axis=1), other_TV.argmax(axis=1)
    rows_T = np.arange(len(top_T))
    lost_T = reference_TV[rows_T, other_top_T] < reference_TV[rows_T, top_T] - np.log(2)
    return kl_T, top_T == other_top_T, lost_T

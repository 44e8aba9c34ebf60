"""Is the file the model? Each .gguf file against merged, over held-out tokens, through the runtime that will run it.

Shapes: T tokens of a row · V vocabulary. Row t of a score is the distribution of token t + 1.

    mean KL      Σ p_merged (log p_merged - log p_file), mean over tokens      (Kullback & Leibler 1951)
    same top     share of tokens whose likeliest next token is the same
    lost top     share of tokens whose likeliest next token is another, that merged finds less than half as likely:
                 where merged itself can hardly choose between two, the other one is no loss

Gated over target tokens (what the model was taught to say); all tokens are reported beside them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
    "Q8_0": Bound(0.01, 0.02),
    "Q6_K": Bound(0.03, 0.03),
    "Q5_K_M": Bound(0.1, 0.05),
    "Q5_K_S": Bound(0.1, 0.05),
    "Q4_K_M": Bound(0.2, 0.1),
    "Q4_K_S": Bound(0.2, 0.1),
    "Q4_0": Bound(0.4, 0.15),
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
    lost_top: float
    lost_top_bound: float | None

    @property
    def failures(self) -> list[str]:
        """Which bound it is beyond, in words; none where it passes."""
        failures = []
        if self.bound is not None and not self.mean_kl <= self.bound:
            failures.append(f"mean KL {self.mean_kl:.4f} is beyond {self.bound}")
        # few target tokens say little: what counts is whether so many can be lost by chance
        lowest = wilson_interval(round(self.lost_top * self.num_targets), self.num_targets)[0]
        if self.lost_top_bound is not None and not lowest <= self.lost_top_bound:
            failures.append(
                f"{self.lost_top:.1%} of top tokens are lost, at most {self.lost_top_bound:.0%} may be"
            )
        return failures

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


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
    sums = {name: np.zeros(5) for name in files}  # KL, same, lost top over targets; KL, same over all
    num_targets = num_tokens = 0
    for row in rows:
        ids = [int(i) for i in row.input_ids_T]
        is_target_T = row.labels_T[1:] != IGNORE
        num_targets += int(is_target_T.sum())
        num_tokens += len(is_target_T)
        reference_TV = merged.score(ids)[:-1]
        for name, backend in files.items():
            kl_T, same_T, lost_T = divergence(reference_TV, backend.score(ids)[:-1])
            targets = (kl_T[is_target_T].sum(), same_T[is_target_T].sum(), lost_T[is_target_T].sum())
            sums[name] += (*targets, kl_T.sum(), same_T.sum())
        advance()
    return {
        name: FileParity(
            mean_kl=float(total[0] / num_targets),
            same_top=float(total[1] / num_targets),
            mean_kl_all=float(total[3] / num_tokens),
            same_top_all=float(total[4] / num_tokens),
            num_targets=num_targets,
            num_tokens=num_tokens,
            bound=BOUNDS[name].mean_kl if name in BOUNDS else None,
            lost_top=float(total[2] / num_targets),
            lost_top_bound=BOUNDS[name].lost_top if name in BOUNDS else None,
        )
        for name, total in sums.items()
    }


def divergence(
    reference_TV: npt.NDArray[np.float32], other_TV: npt.NDArray[np.float32]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """(KL of reference to other, same likeliest token, lost likeliest token) [T] each, from log-probabilities."""
    kl_T = (np.exp(reference_TV) * (reference_TV - other_TV)).sum(axis=1, dtype=np.float64)
    top_T, other_top_T = reference_TV.argmax(axis=1), other_TV.argmax(axis=1)
    rows_T = np.arange(len(top_T))
    lost_T = reference_TV[rows_T, other_top_T] < reference_TV[rows_T, top_T] - np.log(2)
    return kl_T, top_T == other_top_T, lost_T

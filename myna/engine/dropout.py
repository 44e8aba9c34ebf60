"""LoRA dropout without a generator's state: whether a number is dropped follows from where it stands.

Shapes: T tokens of a pack · P adapters of the model · K columns of an adapter's input.

    draw (seed, step, pack) ─► one random word for each token and adapter, one for each column
    keep[t, k] = mix(word of (t, adapter) ^ word of k) ≥ rate · 2³²

So the forward, the backward, a layer that is run again and a resumed run all ask for one mask and get the same, and nothing
is stored. Every adapter has masks of its own, as in peft. `myna_drop` in native_typed.h is the same function in C.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import torch

Draw = tuple[int, ...]

# Multipliers of a 32-bit mixer (hash-prospector by Chris Wellons: lowest bias of two multiplications), as int32
FIRST: Final = 0x21F0AAAD
SECOND: Final = 0xD35A2D97 - (1 << 32)
SHIFT: Final = 15
LOWEST: Final = -(1 << 31)
DROPOUT: Final = 1  # tells these words from other uses of a seed


@dataclass(frozen=True)
class DropoutMask:
    """One adapter's mask over its input [T, K]. Inverted dropout: what is kept is multiplied by `scale`."""

    rows_T: torch.Tensor  # int32
    columns_K: torch.Tensor  # int32
    rate: float

    @property
    def scale(self) -> float:
        return 1 / (1 - self.rate)

    @property
    def threshold(self) -> int:
        """The smallest mixed word, as int32, that is kept."""
        return min(LOWEST + round(self.rate * (1 << 32)), -LOWEST - 1)

    def keep(self) -> torch.Tensor:
        """True where a number is kept: [T, K]."""
        word = self.rows_T[:, None] ^ self.columns_K
        word *= FIRST  # modulo 2³²
        word ^= word >> SHIFT  # with the sign
        word *= SECOND
        return word >= self.threshold


class PackMasks:
    """The masks of one pack. A token's do not depend on how many tokens come after it."""

    def __init__(
        self, draw: Draw, num_tokens: int, num_adapters: int, widest: int, device: torch.device
    ) -> None:
        random = np.random.default_rng([*draw, DROPOUT])
        columns_K = random.integers(LOWEST, -LOWEST, widest, dtype=np.int32)
        rows_TP = random.integers(LOWEST, -LOWEST, (num_tokens, num_adapters), dtype=np.int32)
        self._columns_K = torch.from_numpy(columns_K).to(device)
        self._rows_PT = torch.from_numpy(np.ascontiguousarray(rows_TP.T)).to(device)

    def of(self, adapter: int, num_in: int, rate: float) -> DropoutMask:
        """The mask of an adapter, counted in the order of the forward."""
        return DropoutMask(self._rows_PT[adapter], self._columns_K[:num_in], rate)

"""What is known of a step when it is done, and its line in metrics.jsonl."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from myna.errors import MachineError

METRICS = (
    *(
        "step",
        "loss",
        "learning_rate",
        "target_tokens",
        "tokens",
        "tokens_per_s",
        "target_tokens_per_s",
        "grad_norm",
    ),
    *("seconds", "num_packs", "product_flops", "share_of_peak", "memory_mb", "peak_mb"),
    *("loss_scale", "skipped"),
)


@dataclass(frozen=True)
class StepReport:
    """One optimizer step. `tokens` are the rows' own, `loss` is the mean over `target_tokens`, `seconds` of this step.

    `product_flops` are the floating-point operations of its matrix products (None off the fast path), `share_of_peak`
    what part of this machine's measured product speed they made, `memory_mb` and `peak_mb` what the process holds and held
    at most, in 10⁶ bytes. `loss_scale` is what an fp16 step was scaled by; where its gradient overflowed all the same, the
    step was skipped: `grad_norm` is None and the adapter as before. `validation_loss` is taken at checkpoints alone.
    """

    step: int
    num_steps: int
    loss: float
    learning_rate: float
    target_tokens: int
    tokens: int
    grad_norm: float | None
    seconds: float
    num_packs: int
    product_flops: float | None
    peak_flops: float | None  # of the machine, FLOP/s
    memory_mb: float
    peak_mb: float
    checkpoint: str | None = None
    loss_scale: float | None = None
    validation_loss: float | None = None

    @property
    def skipped(self) -> bool:
        return self.grad_norm is None

    @property
    def tokens_per_s(self) -> float:
        return round(self.tokens / self.seconds, 1)

    @property
    def target_tokens_per_s(self) -> float:
        return round(self.target_tokens / self.seconds, 1)

    @property
    def share_of_peak(self) -> float | None:
        """Of 1; None where the products or the peak are not known."""
        if self.product_flops is None or self.peak_flops is None:
            return None
        return round(self.product_flops / (self.seconds * self.peak_flops), 4)

    def metrics(self) -> dict[str, Any]:
        """The line of metrics.jsonl."""
        return {key: getattr(self, key) for key in METRICS}

    def facts(self) -> str:
        """What a progress bar shows beside the step."""
        share = self.share_of_peak
        parts = (
            f"loss {self.loss:.3f}",
            *(() if self.validation_loss is None else (f"validation {self.validation_loss:.3f}",)),
            f"{self.tokens_per_s:.0f} tokens/s",
            f"{self.target_tokens_per_s:.0f} target",
            *(() if share is None else (f"{share:.0%} of peak",)),
            f"{self.memory_mb:,.0f} MB",
            *(("skipped: its gradient overflowed",) if self.skipped else ()),
        )
        return " · ".join(parts)


def append_metrics(path: Path, report: StepReport) -> None:
    """Adds a step's line. MachineError where it cannot be written."""
    append_line(path, report.metrics())


def append_line(path: Path, entry: Mapping[str, Any]) -> None:
    """Adds a line of a step. MachineError where it cannot be written."""
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
    except OSError as error:
        raise MachineError(
            f"could not be written: {error.strerror}",
            where=str(path),
            help="make room, then the same with --resume",
        ) from error


def cut_metrics(path: Path, last_step: int) -> None:
    """Drops the lines of steps after `last_step` (and a half-written one): a resumed run has each step once."""
    if not path.is_file():
        return
    kept = [json.dumps(line) + "\n" for line in read_lines(path) if line["step"] <= last_step]
    temporary = path.with_name(f".tmp-{path.name}")
    temporary.write_text("".join(kept), encoding="utf-8")
    os.replace(temporary, path)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a run that is being trained, without one that a kill left half-written."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        with contextlib.suppress(json.JSONDecodeError):
            entry = json.loads(line)
            if isinstance(entry, dict) and isinstance(entry.get("step"), int):
                lines.append(entry)
    return lines

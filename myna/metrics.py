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
from myna.run import sync_file, write_lines

LONGEST_LINE = 4096  # bytes

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


class MetricsLog:
    """metrics.jsonl as it grows. Where the disk is full its lines wait, in order, until there is room again.

    `num_bytes` is how far the file is known to be whole.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_bytes = path.stat().st_size if path.is_file() else 0
        self._waiting: list[bytes] = []

    def add(self, entry: Mapping[str, Any]) -> str | None:
        """Adds a line; why it has to wait, where it has to."""
        self._waiting.append(json.dumps(entry).encode() + b"\n")
        return self._write()

    def sync(self) -> None:
        """Afterwards every line is on the disk. MachineError where it cannot be."""
        fault = self._write()
        if fault is None:
            try:
                if self.path.is_file():
                    sync_file(self.path)
            except OSError as error:
                fault = error.strerror or str(error)
        if fault is not None:
            raise MachineError(
                f"could not be written: {fault}",
                where=str(self.path),
                help="make room, then the same with --resume",
            )

    def _write(self) -> str | None:
        try:
            with self.path.open("ab") as file:
                # what a full disk took of a line goes; a file that somebody made shorter is not filled up with zeros
                self.num_bytes = min(self.num_bytes, os.fstat(file.fileno()).st_size)
                if self._waiting:
                    file.truncate(self.num_bytes)
                    file.write(b"".join(self._waiting))
        except OSError as error:
            return error.strerror or str(error)
        self.num_bytes += sum(map(len, self._waiting))
        self._waiting.clear()
        return None


def cut_metrics(path: Path, last_step: int, num_bytes: int | None = None) -> str | None:
    """Drops the lines of steps after `last_step` (and a half-written one): a resumed run has each step once.

    `num_bytes` is where the file ended when the checkpoint of that step was taken. Where it cannot have ended there, lines
    are dropped by their steps, and the answer says so.
    """
    if not path.is_file():
        return (
            f"{path.name} is gone: the steps up to {last_step} are not in it any more" if num_bytes else None
        )
    if num_bytes is not None and _ends_with(path, num_bytes, last_step):
        os.truncate(path, num_bytes)
        return None
    lines = [line for line in read_lines(path) if line["step"] <= last_step]
    write_lines(path, (json.dumps(line) + "\n" for line in lines))
    return (
        None
        if num_bytes is None
        else f"{path.name} is not what it was at step {last_step}: lines may be missing"
    )


def _ends_with(path: Path, num_bytes: int, step: int) -> bool:
    """Whether the file's first `num_bytes` end with a line of that step."""
    with path.open("rb") as file:
        file.seek(max(0, num_bytes - LONGEST_LINE))
        tail = file.read(min(num_bytes, LONGEST_LINE))
    if path.stat().st_size < num_bytes or not tail.endswith(b"\n"):
        return num_bytes == 0 and step == 0
    try:
        return bool(json.loads(tail[:-1].rpartition(b"\n")[2])["step"] == step)
    except (ValueError, KeyError, TypeError):
        return False


def last_line(path: Path) -> dict[str, Any] | None:
    """The last whole line, found from the end."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - LONGEST_LINE))
        lines = file.read().split(b"\n")
    try:
        entry = json.loads(lines[-2])
    except (IndexError, ValueError):
        return None
    return entry if isinstance(entry, dict) else None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a run that is being trained, without one that a kill left half-written."""
    lines = []
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        with contextlib.suppress(ValueError):  # of JSON, or of UTF-8
            entry = json.loads(line)
            if isinstance(entry, dict) and isinstance(entry.get("step"), int):
                lines.append(entry)
    return lines

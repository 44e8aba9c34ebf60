"""When a run saves, what stays, and what happens where it cannot: training goes on until it failed three times in a row."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from myna.checkpoint import list_checkpoints, num_bytes_of, prune, save_checkpoint
from myna.errors import MachineError
from myna.metrics import MetricsLog
from myna.mirror import Mirror
from myna.model.sources import Say
from myna.recipe import Recipe
from myna.run import Run, require_room
from myna.state import Owners, Progress, gather

MOST_FAILURES = 3  # in a row


@dataclass
class Saver:
    """Saves a run's state when it is due.

    `made_from` goes into every manifest. `log` is synced before each commit, so that a checkpoint never knows of a line
    that the disk does not.
    """

    run: Run
    recipe: Recipe
    num_steps: int
    owners: Owners
    progress: Progress
    log: MetricsLog
    made_from: Mapping[str, Any]
    mirror: Mirror | None
    say: Say

    def __post_init__(self) -> None:
        self._saved_at, self._failures = time.monotonic(), 0

    def is_due(self, step: int, signal_number: int | None) -> bool:
        """By steps, by minutes, at the end, where a signal or a file RUN/checkpoint-now asks for it."""
        minutes = self.recipe.checkpoint.every_minutes
        return (
            step % self.recipe.train.save_every_steps == 0
            or step == self.num_steps
            or signal_number is not None
            or (minutes is not None and time.monotonic() - self._saved_at >= 60 * minutes)
            or self.run.asked_path.exists()
        )

    def save(self, step: int, *, is_last: bool) -> str | None:
        """Saves, prunes, mirrors; the checkpoint's name, or None where it could not be saved this time.

        MachineError where that was the third time in a row, or where this process has no other chance (`is_last`).
        """
        try:
            self.log.sync()
            self.progress.metrics_bytes = self.log.num_bytes
            snapshot = gather(step, self.owners)
            require_room(self.run.path, num_bytes_of(snapshot), "a checkpoint")
            path = save_checkpoint(self.run.checkpoints_dir, snapshot, self.made_from)
        except MachineError as error:
            self._note_failure(step, error, is_last=is_last)
            return None
        self._failures, self._saved_at = 0, time.monotonic()
        self._prune()
        if self.mirror is not None:
            self.mirror.follow(self.run, path, self.say)
        try:
            self.run.asked_path.unlink(missing_ok=True)
        except OSError as error:
            self.say(
                f"{self.run.asked_path} cannot be removed ({error.strerror}): every step is saved until it is"
            )
        return path.name

    def _prune(self) -> None:
        keep = self.recipe.checkpoint
        prune(
            self.run.checkpoints_dir,
            newest=self.recipe.train.keep_checkpoints,
            best_step=self.progress.best_step if keep.keep_best else None,
            every=keep.keep_every_steps,
        )

    def _note_failure(self, step: int, error: MachineError, *, is_last: bool) -> None:
        self._failures += 1
        self.progress.forget_best(step)  # there is no checkpoint to take it from
        with contextlib.suppress(
            OSError
        ):  # asked for again at every step, it would be the third failure soon
            self.run.asked_path.unlink(missing_ok=True)
        # what is due by the clock is due again at the next interval, not at the next step
        self._saved_at = time.monotonic()
        last_good = last_good_checkpoint(self.run)
        if is_last or self._failures >= MOST_FAILURES:
            times = "" if is_last else f" for the {self._failures}rd time in a row"
            raise MachineError(
                f"no checkpoint could be saved after step {step}{times}: {error.message}; {last_good}",
                where=error.where,
                help="make room there, then the same command with --resume",
                code="checkpoint",
            ) from error
        self.say(
            f"the checkpoint of step {step} could not be saved: {error.where}: {error.message}; {last_good}. Training goes "
            f"on, and tries again when the next one is due"
        )


def last_good_checkpoint(run: Run) -> str:
    """What is told of it where a run ends badly."""
    saved = list_checkpoints(run.checkpoints_dir)
    if not saved:
        return "no checkpoint had been saved yet"
    return f"the last good checkpoint is checkpoints/{saved[-1].name}"

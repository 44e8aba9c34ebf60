"""Every way Myna says no.

    MynaError                       what · where · what to do          exit code
    ├── UsageError                  a command used wrongly                    2
    │   └── RecipeError             a setting that is wrong                   2
    ├── DataError                   rows that cannot be used                  3
    ├── ModelError                  a model, adapter or tokenizer refused     3
    ├── MachineError                this machine lacks something              4
    │   └── CheckpointError         no good checkpoint to go on from          4
    ├── CheckFailed                 parity, a gate, a loss not finite         5
    └── Interrupted                 HUP, INT, TERM: a checkpoint is behind    128 + signal

Anything else that escapes is a bug of Myna's: a traceback and exit code 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar


class MynaError(Exception):
    """A failure the user can act on: `message` says what, `where` the place, `help` the cure."""

    exit_code: ClassVar[int] = 1
    default_code: ClassVar[str] = "error"

    def __init__(
        self,
        message: str,
        *,
        where: str | None = None,
        help: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.where = where
        self.help = help
        self.code = code or self.default_code

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where else ""
        cure = f"\n  help: {self.help}" if self.help else ""
        return f"{place}{self.message}{cure}"

    def as_json(self) -> Mapping[str, str | None]:
        """The object that `--json` prints under `error`."""
        return {
            "code": self.code,
            "message": self.message,
            "where": self.where,
            "help": self.help,
        }


class UsageError(MynaError):
    exit_code = 2
    default_code = "usage"


class RecipeError(UsageError):
    default_code = "recipe"


class DataError(MynaError):
    """`place` is where the row stands, as a value, where the fault is one row's.

    `ends_reading`: no row after it was read.
    """

    exit_code = 3
    default_code = "data"
    place: object = None
    ends_reading: bool = False


class ModelError(MynaError):
    exit_code = 3
    default_code = "model"


class MachineError(MynaError):
    exit_code = 4
    default_code = "environment"


class CheckpointError(MachineError):
    default_code = "checkpoint"


class CheckFailed(MynaError):
    exit_code = 5
    default_code = "check"


class Interrupted(MynaError):
    """Stopped by a signal after a checkpoint; the exit code is 128 + `signal_number`."""

    default_code = "interrupted"

    def __init__(
        self, message: str, *, signal_number: int, where: str | None = None, help: str | None = None
    ) -> None:
        super().__init__(message, where=where, help=help)
        self.signal_number = signal_number

"""Myna teaches a small language model your task, proves that it learned, and hands you the file that runs it."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# The public names and where they live; each is imported when it is first asked for, so `import myna` stays quick.
_HOMES = {
    "Conversation": "myna.data.conversation",
    "Message": "myna.data.conversation",
    "MynaError": "myna.errors",
    "Recipe": "myna.recipe",
    "Run": "myna.run",
    "StepReport": "myna.metrics",
    "ToolCall": "myna.data.conversation",
    "load_recipe": "myna.recipe",
    "run_recipe": "myna.pipeline",
    "train": "myna.train",
}

__all__ = [
    "Conversation",
    "Message",
    "MynaError",
    "Recipe",
    "Run",
    "StepReport",
    "ToolCall",
    "load_recipe",
    "run_recipe",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'myna' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)

"""What the encoder is told of a run's weights: importance measured over its training rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from myna.data.render import load_chat_tokenizer, render_example
from myna.engine.memory import forget_models
from myna.errors import UsageError
from myna.export.encoder import Floats
from myna.export.importance import importance_keys, measure_importance
from myna.export.parity import choose_rows
from myna.export.prove import Origin
from myna.model.families import family_of
from myna.recipe import Recipe
from myna.run import Run
from myna.show import Show
from myna.stored import training_rows

MOST_ROWS, ENOUGH_TOKENS = 500, 20_000  # what it is measured over, at most


@dataclass(frozen=True)
class Weighed:
    """Importance [C] by GGUF's tensor name, over how many rows, and what a file says of it."""

    by_tensor: Mapping[str, Floats]
    keys: Mapping[str, str | int]
    num_rows: int


def weigh(run: Run, recipe: Recipe, origin: Origin, show: Show) -> Weighed:
    """Measures it on what the files are made from; UsageError where there are no training rows."""
    tokenizer = load_chat_tokenizer(run.tokenizer_dir)
    max_length = recipe.data.max_length
    assert max_length is not None
    examples = (render_example(row, tokenizer, max_length) for row in training_rows(run, MOST_ROWS))
    rows = [[int(i) for i in row.input_ids_T] for row in choose_rows(examples, ENOUGH_TOKENS)]
    if not rows:
        raise UsageError(
            "export.importance: there are no training rows to measure it on",
            where=str(run.path),
            help="it is measured on the rows a run was trained on; elsewhere set export.importance: false",
        )
    show.say(f"measuring importance over {len(rows)} training rows")
    model = origin.plain_model()
    family = family_of(model.config.to_dict())
    measured = measure_importance(
        model, family, rows, progress=lambda done, total: show.progress("importance, row", done, total)
    )
    del model
    forget_models()
    return Weighed(measured, importance_keys(measured, len(rows), Path(recipe.data.train).name), len(rows))

"""From a recipe to the tokenizer that its rows are counted with, where that is on this disk: nothing is fetched."""

from __future__ import annotations

from myna.data.token_checks import TokenSettings
from myna.errors import MynaError
from myna.model.sources import base_on_disk, context_of
from myna.recipe import Recipe
from myna.settings import DEFAULT_MAX_LENGTH, DataSettings


def token_settings(recipe: Recipe, data: DataSettings) -> TokenSettings | str:
    """For rows read by `data`, or the sentence that says why tokens are not counted."""
    base = recipe.model.base
    try:
        found = base_on_disk(base)
        folder = found.folder if found else None
        if folder is None or not (folder / "tokenizer.json").is_file():
            return f"tokens: the tokenizer of {base} is not on this disk yet (`myna data show` fetches it)"
        context = context_of(folder)
    except MynaError as error:
        return f"tokens: {base}: {error.message}"
    longest = data.max_length or min(context or DEFAULT_MAX_LENGTH, DEFAULT_MAX_LENGTH)
    return TokenSettings(base, folder, longest, data)

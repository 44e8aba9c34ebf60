"""What is wrong with a recipe: each fault with its line and the nearest name, all at once."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError
from ruamel.yaml.comments import CommentedMap, CommentedSeq

from myna.errors import RecipeError


def recipe_error(
    error: ValidationError,
    tree: Mapping[str, Any],
    where: str,
    set_here: Mapping[str, str],
    known: Sequence[str],
) -> RecipeError:
    """Everything that pydantic refuses in `tree`, which came from `where`, as one error.

    `set_here` are the settings that `--set` gave and their texts, `known` every setting as block.name.
    """
    faults = [_fault_line(fault, tree, where, set_here, known) for fault in error.errors()]
    first, *rest = faults
    return RecipeError("\n".join([first[1], *(f"{place}: {text}" for place, text in rest)]), where=first[0])


def _fault_line(
    fault: Any, tree: Mapping[str, Any], where: str, set_here: Mapping[str, str], known: Sequence[str]
) -> tuple[str, str]:
    """One fault of pydantic's as (file:line, sentence)."""
    path = [part for part in fault["loc"] if isinstance(part, str) and not part.startswith("list[")]
    path = [part for part in path if part not in ("str", "function-after")]
    dotted = ".".join(path)
    line = _line_of(tree, [part for part in fault["loc"] if part in path or isinstance(part, int)])
    place = f"{where}:{line}" if line else where
    place = f"--set {set_here[dotted]}" if dotted in set_here else place
    if fault["type"] == "extra_forbidden":
        return place, f"{dotted} is not a setting.{_nearest(path, known)}"
    if fault["type"] == "missing":
        return place, f"{dotted} is missing; --set {dotted}=… or a line in the recipe gives it."
    given = "" if isinstance(fault["input"], dict) else f" (it is {fault['input']!r})"
    return place, f"{dotted}: {fault['msg'][0].lower()}{fault['msg'][1:]}{given}."


def _nearest(path: Sequence[str], known: Sequence[str]) -> str:
    """A hint at the name that was meant: in the same block first, then anywhere."""
    blocks = list(dict.fromkeys(key.split(".")[0] for key in known))
    if len(path) == 1:
        near = difflib.get_close_matches(path[0], blocks, n=1, cutoff=0.6)
        if near:
            return f" Did you mean {near[0]}?"
        leaves = {key.split(".")[1]: key for key in known}
        near = difflib.get_close_matches(path[0], leaves, n=1, cutoff=0.6)
        return f" Did you mean {leaves[near[0]]}?" if near else f" Blocks: {', '.join(blocks)}."
    # the right name in another block is nearer than another name in this one
    leaves = {key.rpartition(".")[2]: key for key in known if not key.startswith(f"{path[0]}.")}
    elsewhere = difflib.get_close_matches(path[-1], leaves, n=1, cutoff=0.8)
    here = difflib.get_close_matches(f"{path[0]}.{path[-1]}", known, n=1, cutoff=0.85)
    if elsewhere and not here:
        return f" Did you mean {leaves[elsewhere[0]]}?"
    near = difflib.get_close_matches(".".join(path), known, n=1, cutoff=0.6)
    if near:
        return f" Did you mean {near[0]}?"
    own = [key for key in known if key.startswith(f"{path[0]}.")]
    return f" Settings there: {', '.join(own)}."


def _line_of(tree: Any, path: Sequence[str | int]) -> int | None:
    line: int | None = None
    node = tree
    for part in path:
        if isinstance(node, CommentedSeq) and isinstance(part, int) and part < len(node):
            line = int(node.lc.item(part)[0]) + 1
        elif isinstance(node, CommentedMap) and part in node:
            line = int(node.lc.key(part)[0]) + 1
        else:
            break
        node = node[part]
    return line

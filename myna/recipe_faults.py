"""What is wrong with a recipe: each fault with its line and the nearest name, all at once."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError
from ruamel.yaml.comments import CommentedMap, CommentedSeq

from myna.errors import RecipeError

# How near a name must be to be the one that was meant, by difflib's ratio of a block's name or a setting's alone:
# tests/test_recipe.py lists mistypings on both sides.
NEAR = 0.66
MAIN_SETTING = {
    "run": "name",
    "model": "base",
    "data": "train",
    "adapter": "method",
}  # what a block's one text may be


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
    if fault["type"] in ("model_type", "list_type"):
        return place, _of_another_kind(dotted, fault, known)
    given = "" if isinstance(fault["input"], dict) else f" (it is {fault['input']!r})"
    return place, f"{dotted}: {fault['msg'][0].lower()}{fault['msg'][1:]}{given}."


def _of_another_kind(dotted: str, fault: Any, known: Sequence[str]) -> str:
    """A text where a block of settings is due, or a block where a list is: what is, and the line to paste."""
    value, name = fault["input"], dotted.rpartition(".")[2]
    is_text = isinstance(value, str) and value
    if fault["type"] == "list_type":
        line: object = [value] if value or value == 0 else []
        return f"{dotted} is a list, not {_kind_of(value)}; write `{name}: {_pasted(line)}`."
    if any(isinstance(part, int) for part in fault["loc"]):
        line = [{"train": value if is_text else "FILE"}]
        return f"each entry of {dotted} is a block of settings, not {_kind_of(value)}; write `{name}: {_pasted(line)}`."
    what = f"{dotted} is a block of settings, not {_kind_of(value)}"
    if is_text and dotted in MAIN_SETTING:
        return f"{what}; write `{name}: {_pasted({MAIN_SETTING[dotted]: value})}`."
    own = [key for key in known if key.startswith(f"{dotted}.")]
    return f"{what}; leave it out, or give settings of it: {', '.join(own)}."


def _kind_of(value: object) -> str:
    kinds = {
        str: "a text",
        list: "a list",
        dict: "a block",
        bool: "a yes or no",
        int: "a number",
        float: "a number",
    }
    kind = next((word for kind, word in kinds.items() if isinstance(value, kind)), "nothing")
    return f"{kind} ({value!r})" if isinstance(value, str | int | float) else kind


def _pasted(value: object) -> str:
    """As YAML in one line: keys bare, texts in quotes."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_pasted(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_pasted, value)) + "]"
    return json.dumps(value, ensure_ascii=False, default=str)


def _nearest(path: Sequence[str], known: Sequence[str]) -> str:
    """A hint at the name that was meant: in the same block first, then anywhere."""
    blocks = list(dict.fromkeys(key.split(".")[0] for key in known))
    if len(path) == 1:
        near = difflib.get_close_matches(path[0], blocks, n=1, cutoff=NEAR)
        if near:
            return f" Did you mean {near[0]}?"
        leaves = {key.split(".")[1]: key for key in known}
        near = difflib.get_close_matches(path[0], leaves, n=1, cutoff=NEAR)
        return f" Did you mean {leaves[near[0]]}?" if near else f" Blocks: {', '.join(blocks)}."
    # the right name in another block is nearer than another name in this one
    leaves = {key.rpartition(".")[2]: key for key in known if not key.startswith(f"{path[0]}.")}
    elsewhere = difflib.get_close_matches(path[-1], leaves, n=1, cutoff=0.8)
    block = ".".join(path[:-1])
    own = {key.rpartition(".")[2]: key for key in known if key.rpartition(".")[0] == block}
    here = difflib.get_close_matches(path[-1], own, n=1, cutoff=0.8 if elsewhere else NEAR)
    if here or elsewhere:
        return f" Did you mean {own[here[0]] if here else leaves[elsewhere[0]]}?"
    there = own.values() or [key for key in known if key.startswith(f"{path[0]}.")]
    return f" Settings there: {', '.join(there)}."


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

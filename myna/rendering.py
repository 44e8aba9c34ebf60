"""Rows as examples: rendered, what is too long or wholly masked counted and said."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from myna.data.conversation import Conversation
from myna.data.epochs import Part, rows_an_epoch
from myna.data.render import ChatTokenizer, Example, render_example, render_examples
from myna.data.sides import Learnt
from myna.data.token_checks import ALLOWED_CUT
from myna.errors import DataError
from myna.model.sources import Say
from myna.recipe import Recipe


def render_parts(
    sources: Sequence[Learnt], tokenizer: ChatTokenizer, recipe: Recipe, say: Say
) -> tuple[tuple[Example, ...], tuple[Part, ...]]:
    """The rows of all files rendered, one after another, and how many of each; of several files their shares are said."""
    rendered = [render_rows(source.rows, tokenizer, recipe, say) for source in sources]
    parts = tuple(Part(len(rows), source.weight) for rows, source in zip(rendered, sources, strict=True))
    if len(sources) > 1:
        tokens = [
            part.rows_an_epoch * sum(len(row.input_ids_T) for row in rows) / part.num_rows
            for part, rows in zip(parts, rendered, strict=True)
        ]
        for source, part, num_tokens in zip(sources, parts, tokens, strict=True):
            say(
                f"an epoch has {part.rows_an_epoch:,} rows of the {part.num_rows:,} of {Path(source.path).name}: "
                f"{part.rows_an_epoch / rows_an_epoch(parts):.0%} of its rows, {num_tokens / sum(tokens):.0%} of its tokens"
            )
    return tuple(example for rows in rendered for example in rows), parts


def render_rows(
    rows: Sequence[Conversation], tokenizer: ChatTokenizer, recipe: Recipe, say: Say
) -> list[Example]:
    """Renders rows; counts and says what was cut or dropped, and refuses more than 1 % of it unasked."""
    max_length = recipe.data.max_length
    assert max_length is not None
    examples, first_long, num_cut, num_dropped, longest = [], "", 0, 0, 0
    for example in (one for row in rows for one in render_examples(row, tokenizer, max_length)):
        longest = max(longest, len(example.input_ids_T) + example.num_cut)
        if example.num_cut:
            num_cut += 1
            first_long = first_long or str(example.place)
        if example.num_targets:
            examples.append(example)
        else:
            num_dropped += 1
    lengths = sorted(len(example.input_ids_T) for example in examples)
    if num_cut > ALLOWED_CUT * len(rows) and not recipe.data.cut_long:
        raise DataError(
            f"{num_cut} of {len(rows)} rows are longer than {max_length} tokens (the longest has {longest})",
            where=first_long,
            help=f"--set data.max_length={longest} keeps them whole; --set data.cut_long=true cuts them",
            code="cut",
        )
    if not examples:
        raise DataError(f"no row is left to train on: all {len(rows)} are wholly masked", code="masked")
    if num_texts := sum(row.is_text for row in rows):
        pieces = len(examples) + num_dropped - len(rows) + num_texts
        say(
            f"{num_texts} texts in {pieces} pieces of at most {max_length} tokens: nothing of a long text is lost"
        )
    say(
        f"{len(examples)} rows to train, {lengths[len(lengths) // 2]} tokens in the middle, {lengths[-1]} at most; "
        f"{num_cut} cut, {num_dropped} wholly masked and left out"
    )
    return examples


def short_enough(
    rows: Sequence[Conversation],
    tokenizer: ChatTokenizer,
    recipe: Recipe,
    say: Say,
    *,
    what: str = "held-out rows",
) -> list[Conversation]:
    """Held-out rows that fit into data.max_length, which no runtime has to cut; how many do not is said."""
    assert recipe.data.max_length is not None
    kept = [
        row
        for row in rows
        if row.is_text or not render_example(row, tokenizer, recipe.data.max_length).num_cut
    ]
    if len(kept) < len(rows):
        say(f"{len(rows) - len(kept)} {what} are longer than data.max_length and left out")
    return kept


def validation_examples(
    rows: Sequence[Conversation], tokenizer: ChatTokenizer, recipe: Recipe
) -> tuple[Example, ...]:
    """The rows of the validation loss, rendered as training rows are. DataError where none has a target token."""
    assert recipe.data.max_length is not None
    max_length = recipe.data.max_length
    rendered = (one for row in rows for one in render_examples(row, tokenizer, max_length))
    examples = tuple(example for example in rendered if example.num_targets)
    if rows and not examples:
        raise DataError(
            f"no validation row has anything to learn: all {len(rows)} are wholly masked", code="masked"
        )
    return examples

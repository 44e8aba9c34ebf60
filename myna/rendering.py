"""Rows as examples: rendered, what is too long or wholly masked counted and said."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from myna.data.conversation import Conversation
from myna.data.epochs import Part, rows_an_epoch
from myna.data.render import ChatTokenizer, Example
from myna.data.render_many import render_many
from myna.data.sides import Learnt
from myna.data.spool import chosen
from myna.data.token_cache import RenderedCounts, render_into_tokens
from myna.data.token_checks import ALLOWED_CUT
from myna.data.token_rows import TokenRows
from myna.errors import DataError
from myna.model.sources import Say, cache_dir
from myna.recipe import Recipe


def render_parts(
    sources: Sequence[Learnt], tokenizer: ChatTokenizer, recipe: Recipe, say: Say
) -> tuple[TokenRows, tuple[Part, ...]]:
    """The rows of all files rendered, one after another, and how many of each; of several files their shares are said.

    What was cut or has nothing to learn is counted and said. DataError where more than 1 % was cut unasked, or none is left.
    """
    max_length = recipe.data.max_length
    assert max_length is not None
    rows = [source.rows for source in sources]
    examples, counts = render_into_tokens(rows, tokenizer, max_length, cache_dir() / "tokens", say)
    parts = tuple(Part(count.num_kept, source.weight) for count, source in zip(counts, sources, strict=True))
    lengths = examples.lengths
    starts = np.cumsum([0, *(part.num_rows for part in parts)])
    own = [lengths[start:end] for start, end in itertools.pairwise(starts)]
    for count, of_file in zip(counts, own, strict=True):
        _say_counts(count, of_file, recipe, say)
    if len(sources) > 1:
        tokens = [
            part.rows_an_epoch * float(of_file.mean()) for part, of_file in zip(parts, own, strict=True)
        ]
        for source, part, num_tokens in zip(sources, parts, tokens, strict=True):
            say(
                f"an epoch has {part.rows_an_epoch:,} rows of the {part.num_rows:,} of {Path(source.path).name}: "
                f"{part.rows_an_epoch / rows_an_epoch(parts):.0%} of its rows, {num_tokens / sum(tokens):.0%} of its tokens"
            )
    return examples, parts


def _say_counts(count: RenderedCounts, lengths: npt.NDArray[np.int64], recipe: Recipe, say: Say) -> None:
    """Says what became of the rows of a file; refuses more than 1 % of it cut unasked, and nothing left."""
    max_length = recipe.data.max_length
    if count.num_cut > ALLOWED_CUT * count.num_rows and not recipe.data.cut_long:
        raise DataError(
            f"{count.num_cut} of {count.num_rows} rows are longer than {max_length} tokens "
            f"(the longest has {count.longest})",
            where=count.first_long,
            help=f"--set data.max_length={count.longest} keeps them whole; --set data.cut_long=true cuts them",
            code="cut",
        )
    if not count.num_kept:
        raise DataError(f"no row is left to train on: all {count.num_rows} are wholly masked", code="masked")
    if count.num_texts:
        say(
            f"{count.num_texts} texts in {count.num_pieces} pieces of at most {max_length} tokens: "
            "nothing of a long text is lost"
        )
    say(
        f"{count.num_kept} rows to train, {np.sort(lengths)[len(lengths) // 2]} tokens in the middle, "
        f"{lengths.max()} at most; {count.num_cut} cut, {count.num_masked} wholly masked and left out"
    )


def short_enough(
    rows: Sequence[Conversation],
    tokenizer: ChatTokenizer,
    recipe: Recipe,
    say: Say,
    *,
    what: str = "held-out rows",
) -> Sequence[Conversation]:
    """Held-out rows that fit into data.max_length, which no runtime has to cut; how many do not is said."""
    max_length = recipe.data.max_length
    assert max_length is not None
    asked = render_many((row for row in rows if not row.is_text), tokenizer, max_length)
    kept = chosen(rows, lambda row: row.is_text or not next(asked).num_cut)
    if len(kept) < len(rows):
        say(f"{len(rows) - len(kept)} {what} are longer than data.max_length and left out")
    return kept


def validation_examples(
    rows: Sequence[Conversation], tokenizer: ChatTokenizer, recipe: Recipe
) -> Sequence[Example]:
    """The rows of the validation loss, rendered as training rows are. DataError where none has a target token."""
    assert recipe.data.max_length is not None
    examples, _ = render_into_tokens([rows], tokenizer, recipe.data.max_length, cache_dir() / "tokens")
    if rows and not examples:
        raise DataError(
            f"no validation row has anything to learn: all {len(rows)} are wholly masked", code="masked"
        )
    return examples

"""What a template writes, cut at the borders of assistant turns, each piece tokenized by itself: ids and labels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from myna.data.apart import Way
from myna.data.control import Given
from myna.errors import DataError, ModelError

IGNORE = -100  # the label of a token that is not in the loss, as torch and transformers have it
IntArray = npt.NDArray[np.int64]


def pieces_of(
    told: Given,
    way: Way,
    closing_ids: frozenset[int],
    *,
    add_generation_prompt: bool,
    trained: Sequence[bool] | None = None,
) -> tuple[IntArray, IntArray]:
    """(input_ids_T, labels_T) of what a template is told; an assistant turn ends with its last closing token.

    `trained` says of each message whether it is, by default all are. Raises ModelError where the template rewrites earlier
    turns, DataError where an assistant turn would end without a closing token.
    """
    ids: list[int] = []
    labels: list[int] = []
    done, tail = "", ""
    messages = told["messages"]
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = way.render({**told, "messages": messages[:index]}, True)
        whole = way.render({**told, "messages": messages[: index + 1]}, False)
        prompt_ids = way.encode(tail + _continuation(prompt, done)).ids
        answer_ids, tail = _answer(_continuation(whole, prompt), closing_ids, way)
        ids += prompt_ids + answer_ids
        is_trained = trained is None or trained[index]
        labels += [IGNORE] * len(prompt_ids) + (answer_ids if is_trained else [IGNORE] * len(answer_ids))
        done = whole
    if add_generation_prompt:
        prompt_ids = way.encode(tail + _continuation(way.render(told, True), done)).ids
        ids += prompt_ids
        labels += [IGNORE] * len(prompt_ids)
    return np.asarray(ids, dtype=np.int64), np.asarray(labels, dtype=np.int64)


def _continuation(text: str, start: str) -> str:
    if not text.startswith(start):
        raise ModelError(
            "the chat template rewrites earlier turns when one is added, so a row cannot be masked exactly",
            help="use rows with one assistant turn, or give the base a template that only appends",
        )
    return text[len(start) :]


def _answer(text: str, closing_ids: frozenset[int], way: Way) -> tuple[list[int], str]:
    """Ids of an assistant turn up to and with its stop token, and the text the template puts after that."""
    encoding = way.encode(text)
    ids = encoding.ids
    for position in range(len(ids) - 1, -1, -1):
        if ids[position] in closing_ids:
            end = encoding.offsets[position][1]
            return ids[: position + 1], text[end:]
    raise DataError(
        "the chat template ends an assistant turn without a stop token: the model would never learn to stop",
        help="the template must close assistant turns with a special token such as <|im_end|> or </s>",
        code="no-stop-token",
    )

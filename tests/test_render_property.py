"""Training and prompting agree to the last id, on every template and whatever is said."""

from __future__ import annotations

from pathlib import Path

import pytest
from attacks import ATTACKS, CASES
from hypothesis import given, settings
from hypothesis import strategies as st

from myna.data.conversation import Conversation, Message
from myna.data.pieces import IGNORE
from myna.data.render import ChatTokenizer, load_chat_tokenizer, render_example, render_pieces, render_prompt
from myna.data.render_many import render_many

Made = dict[str, ChatTokenizer]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("property")
    return {name: CASES[name](folder / str(n)) for n, name in enumerate(CASES)}


PIECES = ("hello", " there", "\n", "\n\n", "  ", "é", "北京", "😀", "12", "```py\n", "don't", "\t", *ATTACKS)
said = st.one_of(
    st.lists(st.sampled_from(PIECES), min_size=1, max_size=5).map("".join),
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20),
).filter(lambda text: bool(text.strip()))


@st.composite
def conversations(draw: st.DrawFn) -> Conversation:
    system = draw(st.none() | said)
    messages = [] if system is None else [Message("system", system)]
    for _ in range(draw(st.integers(1, 3))):
        messages += [Message("user", draw(said)), Message("assistant", draw(said), draw(st.booleans()))]
    return Conversation(tuple(messages))


def taken(conversation: Conversation, tokenizer: ChatTokenizer) -> Conversation:
    """Without the system line where the template knows none."""
    if "System role not supported" in tokenizer.template_text:
        return Conversation(tuple(m for m in conversation.messages if m.role != "system"))
    return conversation


@pytest.mark.parametrize("name", CASES)
@given(conversation=conversations())
@settings(max_examples=3, deadline=None)
def test_what_is_trained_is_what_is_prompted(name: str, made: Made, conversation: Conversation) -> None:
    """Before each assistant turn stand the ids that chat sends there; the turn is trained up to its stop token, or not."""
    tokenizer = made[name]
    messages = taken(conversation, tokenizer).messages
    example = render_example(Conversation(messages), tokenizer, 100_000)
    ids, labels = example.input_ids_T.tolist(), example.labels_T.tolist()
    expected = [IGNORE] * len(ids)
    end = 0
    for index, message in enumerate(messages):
        if message.role != "assistant":
            continue
        prompt = render_prompt(Conversation(messages[:index]), tokenizer)
        assert ids[: len(prompt)] == prompt
        assert len(prompt) > end
        end = len(render_pieces(Conversation(messages[: index + 1]), tokenizer)[0])
        assert ids[end - 1] in tokenizer.stop_ids
        assert end > len(prompt)
        if message.trained:
            expected[len(prompt) : end] = ids[len(prompt) : end]
    assert end == len(ids)
    assert labels == expected
    (many,) = render_many([Conversation(messages)], tokenizer, 100_000)
    assert many.input_ids_T.tolist() == ids
    assert many.trained_T.tolist() == [int(label != IGNORE) for label in labels]


def test_reading_a_tokenizer_again_gives_the_same_ids(tmp_path: Path) -> None:
    """Spellings that nobody can guess are drawn anew in every process; no id depends on them."""
    for name in ("smollm", "mistral", "tagged"):
        first, second = CASES[name](tmp_path / name), load_chat_tokenizer(tmp_path / name)
        assert first.apart.respelled.spellings != second.apart.respelled.spellings
        for attack in ATTACKS:
            conversation = Conversation((Message("user", attack), Message("assistant", attack)))
            ids = [render_pieces(conversation, tokenizer)[0].tolist() for tokenizer in (first, second)]
            assert ids[0] == ids[1]

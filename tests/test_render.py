"""The loss mask against literal tokens and literal labels, and the template against transformers' own."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
from msgspec.structs import replace

from myna.data.conversation import Conversation, Message
from myna.data.render import (
    IGNORE,
    PLAIN_TEMPLATE,
    ChatTokenizer,
    compile_template,
    load_chat_tokenizer,
    render_example,
    render_pieces,
    render_prompt,
)
from myna.errors import DataError, ModelError


def talk(*turns: str, system: str | None = None) -> Conversation:
    roles = ("user", "assistant")
    messages = [Message(roles[i % 2], text) for i, text in enumerate(turns)]  # type: ignore[arg-type]
    return Conversation(tuple(messages)).with_system(system)


@pytest.fixture(scope="module")
def tokenizer(tiny_base: Path) -> ChatTokenizer:
    return load_chat_tokenizer(tiny_base)


def with_template(tokenizer: ChatTokenizer, template: str) -> ChatTokenizer:
    return ChatTokenizer(tokenizer.tokenizer, template, tokenizer.special_tokens)


def shown(tokenizer: ChatTokenizer, conversation: Conversation) -> tuple[list[str], list[str]]:
    """(tokens, trained tokens) as texts."""
    ids, labels = render_pieces(conversation, tokenizer)
    texts = [tokenizer.tokenizer.decode([int(i)], skip_special_tokens=False) for i in ids]
    return texts, [text for text, label in zip(texts, labels, strict=True) if label != IGNORE]


def test_literal_tokens_and_literal_labels(tokenizer: ChatTokenizer) -> None:
    texts, trained = shown(tokenizer, talk("a1", "b2"))
    prompt = [
        "<|im_start|>",
        *"user",
        "\n",
        "a",
        "1",
        "<|im_end|>",
        "\n",
        "<|im_start|>",
        *"assist",
        "ant",
        "\n",
    ]
    assert texts == [*prompt, "b", "2", "<|im_end|>"]
    assert trained == ["b", "2", "<|im_end|>"]
    ids, labels = render_pieces(talk("a1", "b2"), tokenizer)
    assert labels.tolist() == [IGNORE] * (len(ids) - 3) + ids.tolist()[-3:]
    assert ids.tolist()[-1] == 2  # the stop token, by its id in the vocabulary


def test_every_assistant_turn_is_trained_and_nothing_else(tokenizer: ChatTokenizer) -> None:
    texts, trained = shown(tokenizer, talk("q", "x", "q", "y", system="s"))
    assert trained == ["x", "<|im_end|>", "y", "<|im_end|>"]
    assert "".join(texts).startswith("<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nq<|im_end|>\n")


def test_a_turn_that_is_not_trained_is_context(tokenizer: ChatTokenizer) -> None:
    """The same ids, and no label where it stands."""
    first, second = (talk("one", "1"), talk("one", "1", "two", "2"))
    whole = render_example(second, tokenizer, 99)
    messages = tuple(replace(m, trained=m.content != "1") for m in second.messages)
    found = render_example(Conversation(messages), tokenizer, 99)
    assert found.input_ids_T.tolist() == whole.input_ids_T.tolist()
    of_first = render_example(first, tokenizer, 99).num_targets
    assert 0 < found.num_targets == whole.num_targets - of_first
    trained = found.labels_T != IGNORE
    assert (found.labels_T[trained] == found.input_ids_T[trained]).all()
    assert trained.nonzero()[0][0] > (whole.labels_T != IGNORE).nonzero()[0][of_first - 1]
    last = render_example(second.last_turn_trained(), tokenizer, 99)
    assert last.labels_T.tolist() == found.labels_T.tolist()


def test_the_text_is_transformers_own(tiny_base: Path, tokenizer: ChatTokenizer) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(tiny_base)
    for conversation in (talk("Hé 12", "a\n b"), talk("q", "x", "r", "y", system="s: {{ 1 }}")):
        for open_end in (False, True):
            ours = tokenizer.render_text(conversation, add_generation_prompt=open_end)
            assert ours == theirs.apply_chat_template(
                conversation.as_dicts(), tokenize=False, add_generation_prompt=open_end
            )
        ids, _ = render_pieces(conversation, tokenizer)
        whole = theirs.apply_chat_template(conversation.as_dicts(), return_dict=False)
        assert ids.tolist() == whole[: len(ids)]  # what follows the last stop token is not trained


def test_training_ids_are_the_prompt_ids_and_the_answer(tokenizer: ChatTokenizer) -> None:
    conversation = talk(
        "q 1", "\n\nx", "r", "\ny"
    )  # an answer that a tokenizer would merge with what is before
    ids, labels = render_pieces(conversation, tokenizer)
    prompt = render_prompt(conversation.prompt(), tokenizer)
    assert ids.tolist()[: len(prompt)] == prompt
    assert all(label != IGNORE for label in labels[len(prompt) :])


def test_generation_tags_change_nothing_but_are_read() -> None:
    marked = "{% for m in messages %} x {%- generation -%} {{ m.content }} {%- endgeneration %}{% endfor %}"
    plain = "{% for m in messages %} x {%- if true -%} {{ m.content }} {%- endif %}{% endfor %}"
    messages = [{"content": "a"}, {"content": "b"}]
    assert compile_template(marked).render(messages=messages) == compile_template(plain).render(
        messages=messages
    )


def test_a_base_without_a_template_gets_the_plain_one(tmp_path: Path) -> None:
    tiny.write_tokenizer(tmp_path, template=None)
    tokenizer = load_chat_tokenizer(tmp_path)
    assert tokenizer.template_text == "{{ bos_token }}" + PLAIN_TEMPLATE
    assert not tokenizer.has_own_template
    _, trained = shown(tokenizer, talk("q", "x", system="s"))
    assert trained == ["x", "<|im_end|>"]


def test_stop_ids_are_what_closes_a_turn_and_eos(tokenizer: ChatTokenizer) -> None:
    assert tokenizer.stop_ids == {2}
    other = with_template(tokenizer, tiny.CHATML.replace("<|im_end|>", "<|endoftext|>"))
    assert other.stop_ids == {0, 2}


def test_a_template_without_a_stop_token_is_refused(tokenizer: ChatTokenizer) -> None:
    bare = with_template(tokenizer, tiny.CHATML.replace("<|im_end|>", ""))
    with pytest.raises(DataError, match="without a stop token"):
        render_example(talk("q", "x"), bare, 99)


def test_a_template_that_rewrites_earlier_turns_is_refused(tokenizer: ChatTokenizer) -> None:
    rewriting = with_template(tokenizer, "{{ messages | length }}" + tiny.CHATML)
    with pytest.raises(ModelError, match="rewrites earlier turns"):
        render_example(talk("q", "x"), rewriting, 99)


def test_a_template_may_refuse(tokenizer: ChatTokenizer) -> None:
    refusing = with_template(tokenizer, "{{ raise_exception('only user first') }}")
    with pytest.raises(ModelError, match="only user first"):
        render_prompt(talk("q"), refusing)


def test_cutting_counts_what_it_cuts(tokenizer: ChatTokenizer) -> None:
    whole = render_example(talk("q", "one two three"), tokenizer, 999)
    assert whole.num_cut == 0
    cut = render_example(talk("q", "one two three"), tokenizer, len(whole.input_ids_T) - 2)
    assert (cut.num_cut, len(cut.input_ids_T)) == (2, len(whole.input_ids_T) - 2)
    assert cut.num_targets == whole.num_targets - 2
    masked = render_example(talk("q", "one"), tokenizer, 8)
    assert masked.num_targets == 0

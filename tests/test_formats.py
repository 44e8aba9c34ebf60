"""Shapes of rows: found out by their keys, read as conversations, refused with the cure."""

from __future__ import annotations

import math
from typing import Any

import pytest

from myna.data.conversation import Conversation, Message, Place, Row
from myna.data.detect import Detected, detect_format, differing
from myna.data.formats import to_conversations
from myna.errors import DataError, RecipeError

U, A, S = "user", "assistant", "system"


def row(values: dict[str, Any], line: int = 1) -> Row:
    return Row(values, Place("t.jsonl", line))


def rows(*values: dict[str, Any]) -> list[Row]:
    return [row(one, line) for line, one in enumerate(values, start=1)]


def talk(*turns: tuple[str, str]) -> tuple[Message, ...]:
    return tuple(Message(role, content) for role, content in turns)  # type: ignore[arg-type]


def read(values: dict[str, Any], columns: dict[str, str] | None = None) -> tuple[Message, ...]:
    """As a file of this one row is read: found out, then made a conversation."""
    one = row(values)
    found = detect_format([one], columns=columns)
    (conversation,) = to_conversations(one, found.name, found.keys)
    if isinstance(conversation, DataError):
        raise conversation
    assert conversation.place == one.place
    return conversation.messages


def refused(values: dict[str, Any], columns: dict[str, str] | None = None) -> DataError:
    with pytest.raises(DataError) as caught:
        read(values, columns)
    assert caught.value.where == "t.jsonl:1"
    return caught.value


PAIR = talk((U, "q"), (A, "a"))
WITH_SYSTEM = talk((S, "s"), (U, "q"), (A, "a"))


@pytest.mark.parametrize("prompt_key", ["prompt", "question", "query", "input"])
@pytest.mark.parametrize("answer_key", ["completion", "answer", "response", "output"])
def test_prompt_and_answer_keys(prompt_key: str, answer_key: str) -> None:
    assert read({"id": 1, prompt_key: "q", answer_key: "a"}) == PAIR


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"system": "s", "prompt": "q", "completion": "a"}, WITH_SYSTEM),
        ({"system": None, "prompt": "q", "completion": "a"}, PAIR),
        ({"system": " ", "prompt": "q", "completion": "a"}, PAIR),
        ({"instruction": "q", "output": "a"}, PAIR),
        ({"instruction": "q", "input": "", "output": "a"}, PAIR),
        ({"instruction": "q", "input": None, "output": "a"}, PAIR),
        ({"instruction": "q", "input": "x", "output": "a"}, talk((U, "q\n\nx"), (A, "a"))),
        ({"instruction": "q", "context": "x", "response": "a"}, talk((U, "q\n\nx"), (A, "a"))),
        ({"instruction": "q", "output": "a", "system": "s"}, WITH_SYSTEM),
        ({"messages": [{"role": U, "content": "q"}, {"role": A, "content": "a"}]}, PAIR),
        (
            {"messages": [{"role": m.role, "content": m.content} for m in WITH_SYSTEM], "tools": None},
            WITH_SYSTEM,
        ),
        (
            {"system": "s", "messages": [{"role": U, "content": "q"}, {"role": A, "content": "a"}]},
            WITH_SYSTEM,
        ),
        (
            {
                "messages": [
                    {"role": U, "content": [{"type": "text", "text": "q"}, {"type": "text", "text": "r"}]},
                    {"role": A, "content": "a", "weight": 1, "tool_calls": None, "name": "bot"},
                ]
            },
            talk((U, "qr"), (A, "a")),
        ),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, PAIR),
        (
            {
                "conversations": [
                    {"from": "system", "value": "s"},
                    {"from": "human", "value": "q"},
                    {"from": "gpt", "value": "a"},
                ]
            },
            WITH_SYSTEM,
        ),
        ({"conversations": [{"role": U, "content": "q"}, {"role": A, "content": "a"}]}, PAIR),
        ({"prompt": "q", "completion": None, "answer": "a"}, PAIR),
        (
            {"messages": [{"role": U, "from": "jo", "content": "q"}, {"role": A, "content": "a"}]},
            PAIR,
        ),
        # Parquet fills keys that other rows have with null
        (
            {
                "conversations": [
                    {"from": "human", "value": "q", "role": None, "content": None},
                    {"from": "gpt", "value": "a", "role": None, "content": None},
                ]
            },
            PAIR,
        ),
    ],
)
def test_shapes(values: dict[str, Any], expected: tuple[Message, ...]) -> None:
    assert read(values) == expected


def test_many_turns_stay_as_they_are() -> None:
    turns = [(U, "1"), (A, " 2\n"), (U, "3"), (A, "4")]
    assert read({"messages": [{"role": r, "content": c} for r, c in turns]}) == talk(*turns)


@pytest.mark.parametrize(
    ("answer", "text"), [(42, "42"), (True, "true"), (False, "false"), (1.5, "1.5"), (0, "0")]
)
def test_numbers_and_booleans_are_their_json_text(answer: Any, text: str) -> None:
    assert read({"prompt": "q", "answer": answer})[-1].content == text


def test_columns_name_the_users_keys() -> None:
    values = {"ticket": "q", "reply": "a", "lang": "en", "rules": "s"}
    assert read(values, {"prompt": "ticket", "completion": "reply", "system": "rules"}) == WITH_SYSTEM
    chat = {"chat": [{"role": U, "content": "q"}, {"role": A, "content": "a"}]}
    assert read(chat, {"messages": "chat"}) == PAIR
    assert read({"prompt": "no", "q2": "q", "completion": "a"}, {"prompt": "q2"}) == PAIR


def test_to_conversation_finds_the_keys_by_itself() -> None:
    one = row({"question": "q", "answer": "a"})
    assert list(to_conversations(one, "prompt_answer", {})) == [Conversation(PAIR, one.place)]


def test_what_is_found_out_is_said() -> None:
    found = detect_format(rows({"id": 1, "prompt": "q", "answer": "a", "source": "x"}))
    assert found == Detected(
        "prompt_answer", 1.0, {"prompt": "prompt", "completion": "answer"}, ("id", "source")
    )
    turns = [{"role": U, "content": "q", "name": "n"}, {"role": A, "content": "a"}]
    assert detect_format(rows({"messages": turns, "id": 3})).ignored == ("id", "messages.name")


def test_a_key_too_many_is_ignored_and_the_most_usual_pair_is_taken() -> None:
    """Chosen pairwise: `prompt` and `completion` are the most usual alone, but no row has both."""
    found = detect_format(
        rows(
            {"prompt": 1, "answer": 1},
            {"prompt": 1, "response": 1},
            {"question": 1, "completion": 1},
            {"question": 1, "completion": 1},
            {"prompt": 1, "answer": 1},
            {"prompt": 1, "answer": 1},
            {"query": 1, "completion": 1},
            {"query": 1, "completion": 1},
        )
    )
    assert dict(found.keys) == {"prompt": "prompt", "completion": "answer"}
    assert found.confidence == 3 / 8
    both = detect_format(rows({"prompt": "q", "completion": "a", "response": "b"}))
    assert both.ignored == ("response",)


def test_rows_of_another_shape_are_named() -> None:
    good = {"prompt": "q", "completion": "a"}
    mixed = rows(good, good, {"instruction": "q", "output": "a"}, {"question": "q", "answer": "a"})
    found = detect_format(mixed)
    assert (found.name, found.confidence) == ("prompt_answer", 0.5)
    errors = [differing(one, found) for one in mixed]
    assert errors[0] is None and errors[1] is None
    assert errors[2] and errors[2].code == "D011" and errors[2].where == "t.jsonl:3"
    assert "Alpaca (instruction, output)" in errors[2].message
    assert errors[3] and "prompt/answer (question, answer)" in errors[3].message


def test_a_missing_key_names_the_keys_and_the_nearest() -> None:
    error = refused({"prompt": "q", "anser": "a"})
    assert (error.code, error.message) == ("D012", "`completion` is missing; the keys are: prompt, anser")
    assert error.help == "--set data.columns.completion=anser"
    assert refused({"prompt": "q", "Output": "a", "x": 1}).help == "--set data.columns.completion=Output"
    assert refused({"prompt": "q", "my reply": "a"}).help == "--set 'data.columns.completion=my reply'"
    assert "one of x, y" in str(refused({"prompt": "q", "x": 1, "y": 2}).help)


def test_one_row_with_a_missing_key_among_good_ones() -> None:
    several = rows({"prompt": "q", "completion": "a"}, {"prompt": "q", "completion": "a"}, {"prompt": "q"})
    error = differing(several[2], detect_format(several))
    assert error and (error.code, error.where) == ("D012", "t.jsonl:3")
    several = rows({"prompt": "q", "answer": "a"}, {"prompt": "q", "answr": "a"})
    error = differing(several[1], detect_format(several))
    assert error and error.message.startswith("`answer` is missing")
    assert str(error.help).endswith("--set data.columns.completion=answr")


def test_a_shape_that_cannot_be_told_lists_what_is_read() -> None:
    error = refused({"ticket": "q", "reply": "a"})
    assert error.code == "D010" and "the keys are: ticket, reply" in error.message
    for name in ("messages", "sharegpt", "alpaca", "prompt_answer"):
        assert f"  {name}: " in error.message
    assert len(error.message.splitlines()) == 6 and "more are in docs/data.md" in error.message
    assert "  chat_log: " in refused({"sendr": "q", "reply": "a"}).message  # the nearest come first
    assert "--set data.columns.prompt=ticket --set data.columns.completion=reply;" in str(error.help)
    assert "data.columns.prompt=KEY" in str(refused({"id": "1", "ticket": "q", "reply": "a"}).help)


def test_keys_with_control_characters_do_not_reach_the_terminal() -> None:
    error = refused({"\x1b[2Jx": "q", "k" * 500: "a"})
    assert "\x1b" not in str(error) and len(error.message.splitlines()[0]) < 200


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"compltion": "reply"}, "Did you mean data.columns.completion?"),
        ({"messages": "a", "prompt": "b"}, "no shape has the columns messages, prompt"),
        ({"prompt": "x", "completion": "x"}, "taken for two columns"),
    ],
)
def test_columns_that_cannot_be(columns: dict[str, str], says: str) -> None:
    with pytest.raises(RecipeError) as caught:
        detect_format(rows({"x": "q", "prompt": "q", "completion": "a"}), columns=columns)
    assert says in caught.value.message and caught.value.help


def test_a_column_that_no_row_has() -> None:
    values = {"prompt": "q", "completion": "a"}
    assert refused(values, {"completion": "reply"}).code == "D012"
    error = refused(values, {"system": "rules"})
    assert "`rules` (data.columns.system) is in no row" in error.message


def test_a_format_that_is_named_is_obeyed() -> None:
    both = rows({"messages": [], "prompt": "q", "completion": "a"})
    assert detect_format(both).name == "messages"
    assert detect_format(both, format_name="prompt_answer").name == "prompt_answer"
    with pytest.raises(DataError) as caught:
        detect_format(rows({"prompt": "q", "completion": "a"}), format_name="alpaca")
    assert caught.value.message.startswith("`instruction` is missing")
    with pytest.raises(RecipeError) as refusal:
        detect_format(both, format_name="alpca")
    assert refusal.value.help == "--set data.format=alpaca"


def turns(*pairs: tuple[Any, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in pairs]}


@pytest.mark.parametrize(
    ("values", "code", "says"),
    [
        ({"prompt": "", "completion": "a"}, "D013", "`prompt` is empty"),
        ({"prompt": "q", "completion": " \n\t"}, "D013", "`completion` is empty"),
        ({"prompt": "q", "completion": None}, "D013", "`completion` is null"),
        ({"prompt": ["q"], "completion": "a"}, "D014", "`prompt` is a list"),
        ({"prompt": "q", "completion": {"a": 1}}, "D014", "`completion` is an object"),
        ({"prompt": "q", "completion": math.nan}, "D014", "`completion` is a number, not a text"),
        ({"prompt": "q", "completion": "\ud83d"}, "D014", "half a character"),
        ({"instruction": " ", "input": "x", "output": "a"}, "D013", "`instruction` is empty"),
        ({"messages": []}, "D013", "holds no messages"),
        ({"messages": None}, "D013", "holds no messages"),
        ({"messages": "hello"}, "D014", "not a list of messages"),
        ({"messages": ["hello"]}, "D016", "the last message is from user"),  # LIMA's texts in turn
        ({"messages": ["hello", 3]}, "D014", "message 1 is a text, not an object"),
        (turns((U, ""), (A, "a")), "D013", "message 1 (user) is empty"),
        (turns((U, "q"), (A, None)), "D013", "message 2 (assistant) is null"),
        (turns((U, "q"), (A, 42)), "D014", "message 2 (assistant) is a number"),
        (turns((U, "q"), (A, [])), "D013", "message 2 (assistant) is empty"),
        ({"messages": [{"role": U}, {"role": A, "content": "a"}]}, "D012", "message 1 has no `content`"),
        ({"messages": [{"content": "q"}]}, "D015", "message 1 has no `role`"),
        (turns(("customer", "q"), ("agent", "a")), "D015", "the role `customer` is not known"),
        (turns(("human", "q"), ("gpt", "a")), "D015", "the roles are: system, user, assistant, tool"),
        (turns((["user"], "q"), (A, "a")), "D015", "the role `a list`"),
        (turns((U, "q"), ("tool", "x"), (A, "a")), "D019", "message 2 is a tool's result"),
        (turns(("developer", "q"), (A, "a")), "D016", "message 2 is from assistant, where user should"),
        (
            {"messages": [{"role": U, "content": "q", "audio": {"id": "1"}}, {"role": A, "content": "a"}]},
            "D017",
            "`audio` is not supported yet",
        ),
        (
            {"messages": [{"role": U, "content": "q"}, {"role": A, "content": "a", "weight": 0.5}]},
            "D014",
            "`weight`",
        ),
        (turns((U, [{"type": "image_url"}]), (A, "a")), "D017", "`image_url` is not supported yet"),
        (turns((U, [{"type": "text"}]), (A, "a")), "D014", "without `text`"),
        (turns((U, "q"), (U, "r"), (A, "a")), "D016", "message 2 is from user, where assistant"),
        (turns((A, "a"), (U, "q"), (A, "a")), "D016", "message 1 is from assistant"),
        (turns((U, "q"), (S, "s"), (A, "a")), "D016", "message 2 is from system"),
        (turns((S, "s"), (S, "s"), (U, "q"), (A, "a")), "D016", "message 2 is from system"),
        (turns((U, "q"), (A, "a"), (U, "r")), "D016", "the last message is from user"),
        (turns((S, "s")), "D016", "the last message is from system"),
        ({"system": "s", **turns((S, "s"), (U, "q"), (A, "a"))}, "D016", "two system messages"),
    ],
)
def test_rows_that_are_refused(values: dict[str, Any], code: str, says: str) -> None:
    error = refused(values)
    assert error.code == code
    assert says in error.message

"""Answers that are calls: found in a text, compared by name and arguments, asked for with what ends them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import tool_rows
from tiny_templates import HERMES_TOOLS

from myna.backends import GeneratedToken, Sampling
from myna.backends.llama_cpp import LlamaCppBackend
from myna.data.conversation import Conversation, Message, ToolCall
from myna.data.render import ChatTokenizer, load_chat_tokenizer
from myna.evaluate.answers import answer_rows, answer_tokens, result_of
from myna.evaluate.calls import answer_ids, calls_in, comparable
from myna.evaluate.scorers import exact_match
from myna.export.gates import is_written_otherwise, prompt_gate, tokens_gate
from myna.export.gguf import write_gguf

TOOLS = tuple(json.dumps(tool, ensure_ascii=False) for tool in tool_rows.TOOLS)
WARM = ToolCall("weather", '{"city": "Lima", "days": 2}', "c1")


def asking(*calls: ToolCall, answer: str = "") -> Conversation:
    return Conversation((Message("user", "q"), Message("assistant", answer, calls=calls)), tools=TOOLS)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>', [("f", {"a": 1})]),
        ('{"name": "f", "parameters": {"a": "}"}}', [("f", {"a": "}"})]),
        (
            '[{"name": "f", "arguments": {}, "id": "123456789"}, {"name": "g", "arguments": {}}]',
            [("f", {}), ("g", {})],
        ),
        ('{"type": "function", "function": {"name": "f", "arguments": "{\\"a\\": 1}"}}', [("f", {"a": 1})]),
        ('so {x} [1] {"name": "f"} {"name": "g", "arguments": {}}!', [("g", {})]),
        ('{"name": "f", "arguments": {"a": 1}', []),
        ('{"name": 7, "arguments": {}}', []),
        ('{"name": "f", "arguments": "x"}', []),
        ("{" * 5000, []),
        ("weather(city='Lima')", []),
        ("", []),
    ],
)
def test_calls_in_a_text(text: str, found: list[tuple[str, object]]) -> None:
    assert list(calls_in(text)) == found


WRITTEN = '<tool_call>\n{"name": "weather", "arguments": {"city": "Lima", "days": 2}}\n</tool_call>'


@pytest.mark.parametrize(
    ("answer", "is_right"),
    [
        (WRITTEN, True),
        ('{"arguments": {"days": 2.0, "city": "Lima"}, "name": "weather"}', True),
        (f"I look.\n{WRITTEN}", True),
        (WRITTEN.replace("Lima", "Cusco"), False),
        (WRITTEN.replace("weather", "clock"), False),
        (WRITTEN + WRITTEN, False),
        ('{"city": "Lima", "days": 2}', False),
        ("It is warm.", False),
        ("", False),
    ],
)
def test_a_call_is_right_by_name_and_arguments(answer: str, is_right: bool) -> None:
    row = asking(WARM)
    assert exact_match(comparable(answer, row, WRITTEN), row.answer()) == is_right


def test_a_dress_that_is_no_json_is_right_where_it_is_just_what_the_template_writes() -> None:
    row, written = asking(WARM), "<function=weather>\n<parameter=city>Lima</parameter>"
    assert comparable(f" {written}\n", row, written) == row.answer()
    assert comparable("<function=clock>", row, written) == "<function=clock>"


def test_parallel_calls_are_right_in_any_order_and_texts_are_left_alone() -> None:
    row = asking(WARM, ToolCall("clock", "{}"))
    told = (
        '[{"name": "clock", "arguments": {}}, {"name": "weather", "arguments": {"city": "Lima", "days": 2}}]'
    )
    assert comparable(told, row, "") == row.answer()
    assert comparable(WRITTEN, row, "") != row.answer()
    plain = replace_answer(row, WRITTEN)
    assert comparable(WRITTEN, plain, "") == WRITTEN


def replace_answer(row: Conversation, text: str) -> Conversation:
    return Conversation((*row.messages[:-1], Message("assistant", text)), tools=row.tools)


class Echo:
    """A backend that says given texts, and stops at what it is told to stop at."""

    name = "echo"

    def __init__(self, answers: Sequence[Sequence[int]]) -> None:
        self.answers, self.sampling = answers, Sampling()

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Iterator[GeneratedToken]:
        self.sampling = sampling
        for index, answer in enumerate(self.answers):
            for token in answer[: sampling.max_tokens]:
                yield GeneratedToken(index, token)
                if token in sampling.stop_ids:
                    break

    def score(self, token_ids: Sequence[int]) -> object:
        raise NotImplementedError


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    tiny.write_tokenizer(folder, HERMES_TOOLS)
    return load_chat_tokenizer(folder)


def test_rows_of_calls_are_scored_as_calls(tokenizer: ChatTokenizer) -> None:
    rows = [asking(WARM), asking(WARM), asking(answer="21 °C.")]
    right, other = answer_ids(rows[0], tokenizer), tokenizer.encode(WRITTEN.replace("Lima", "Cusco"))
    echo = Echo([right, other, tokenizer.encode("21 °C.<|im_end|>")])
    longest = answer_tokens(rows, tokenizer)
    assert longest >= len(right)
    answered = answer_rows(echo, rows, tokenizer, longest)  # type: ignore[arg-type]
    assert answered.answers[0].strip() == WRITTEN
    assert answered.scored[2] == "21 °C."
    assert result_of(answered, rows, num_bytes=1)["exact_match"] == pytest.approx(2 / 3)
    only_calls = replace(answered, answers=answered.answers[:2], scored=answered.scored[:2])
    assert result_of(only_calls, rows[:2], num_bytes=1)["field_f1"] == pytest.approx(2 * 5 / (6 + 6))


def test_a_call_may_end_with_a_token_of_its_own(tokenizer: ChatTokenizer) -> None:
    template = HERMES_TOOLS.replace(
        "{{- '<|im_end|>\\n' }}\n{%- elif message['role'] == 'user' %}",
        "{{- ('<|endoftext|>' if message['tool_calls'] else '<|im_end|>') + '\\n' }}\n{%- elif message['role'] == 'user' %}",
    )
    assert template != HERMES_TOOLS
    other = ChatTokenizer(tokenizer.tokenizer, template, tokenizer.special_tokens)
    assert other.stop_ids == {2}
    echo = Echo([answer_ids(asking(WARM), other)])
    answer_rows(echo, [asking(WARM)], other, 99)  # type: ignore[arg-type]
    assert echo.sampling.stop_ids == {0, 2}


SHORT = ("21.5", "0.1", "1e-07", "7", str(2**63 - 1))
LONG = ("1.0", "123456789.123", "-0.0", str(2**63), "3.14159265")


@pytest.mark.parametrize("number", [*SHORT, *LONG])
def test_numbers_that_llama_cpp_writes_otherwise(number: str) -> None:
    is_long = number in LONG
    called = asking(ToolCall("weather", f'{{"n": [{number}]}}')).messages
    assert is_written_otherwise(Conversation(called)) == is_long
    described = Conversation((Message("user", "q"),), tools=(TOOLS[0].replace("null", number),))
    assert is_written_otherwise(described) == is_long


@pytest.mark.parametrize("function", [{"name": "f"}, {"name": "f", "parameters": {}, "description": "d"}])
def test_descriptions_that_llama_cpp_writes_otherwise(function: dict[str, object]) -> None:
    tool = json.dumps({"type": "function", "function": function})
    assert is_written_otherwise(Conversation((Message("user", "q"),), tools=(tool,)))


def talks(*arguments: str) -> list[Conversation]:
    """A conversation with two calls for each text of arguments."""
    made = []
    for told in arguments:
        calls = (ToolCall("weather", told, "c1"), ToolCall("clock", "{}", "c2"))
        results = (Message("tool", '21 "°C"\n', call_id="c2"), Message("tool", "", call_id="c1"))
        turns = (
            Message("user", "q"),
            Message("assistant", "I look.", calls=calls),
            *results,
            Message("assistant", "a"),
        )
        made.append(Conversation(turns, tools=TOOLS[:1]))
    return made


def test_llama_cpp_makes_the_same_prompts_of_tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny.write_base(tmp_path / "base", template=HERMES_TOOLS, max_position_embeddings=2048)
    write_gguf(base, base, tmp_path / "m.gguf", "Q8_0", name="tiny")
    tokenizer = load_chat_tokenizer(base)
    numbers = ", ".join(SHORT)
    asked = talks(f'{{"é": [{numbers}, "<&>\\t\\"", null, {{"a": true}}]}}', '{"n": 1.0}')
    with contextlib.closing(LlamaCppBackend(tmp_path / "m.gguf", context=1500)) as server:
        gates = [gate(server, tokenizer, asked) for gate in (tokens_gate, prompt_gate)]
        assert all(gate.passes for gate in gates), gates
        assert "1 prompts" in gates[1].detail and "1 left out" in gates[1].detail
        # a number that is left out is one that it does write otherwise
        text, _ = server.chat_prompt(asked[-1].prompt(), {})
        assert text != tokenizer.render_text(asked[-1].prompt(), add_generation_prompt=True)
        monkeypatch.setattr(Conversation, "tool_dicts", lambda self: None)
        (text, _), told = server.chat_prompt(asked[0].prompt(), {}), TOOLS[0]
        assert told not in text  # the tools that it was given are why the prompts were the same

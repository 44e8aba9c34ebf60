"""Rows with tools through chat templates: transformers' text, exact borders and masks, and no template that drops them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import tiny
import tool_rows
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_templates import HERMES_TOOLS, LLAMA31_TOOLS, TEMPLATES
from tiny_tokenizers import write_family_tokenizer

from myna.data.conversation import Conversation, Message, ToolCall
from myna.data.render import (
    IGNORE,
    PLAIN_TEMPLATE,
    ChatTokenizer,
    load_chat_tokenizer,
    render_example,
    render_pieces,
    render_prompt,
)
from myna.data.rows import as_row, read_conversations
from myna.errors import ModelError

TOOLS = tuple(json.dumps(tool, ensure_ascii=False) for tool in tool_rows.TOOLS)
CALL = ToolCall("weather", json.dumps(tool_rows.ARGUMENTS, ensure_ascii=False), "c1")
TALK = Conversation(
    (
        Message("system", "Be brief."),
        Message("user", "How warm?"),
        Message("assistant", "", calls=(CALL,)),
        Message("tool", '{"celsius": "21"}', call_id="c1"),
        Message("assistant", "21 °C."),
    ),
    tools=TOOLS,
)
PARALLEL = Conversation(
    (
        Message("user", "How warm, and how late?"),
        Message("assistant", "Let me see.", calls=(CALL, ToolCall("clock", "{}", "c2"))),
        Message("tool", "21", call_id="c1"),
        Message("tool", "noon", call_id="c2"),
        Message("assistant", "", calls=(ToolCall("clock", "{}", "c3"),)),
    ),
    tools=TOOLS,
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tokenizers")
    tiny.write_tokenizer(root / "hermes", HERMES_TOOLS)
    write_family_tokenizer(root / "llama31", "llama3")
    (root / "llama31" / "chat_template.jinja").write_text(LLAMA31_TOOLS)
    return {path.name: path for path in root.iterdir()}


@pytest.fixture(scope="module")
def tokenizers(folders: dict[str, Path]) -> dict[str, ChatTokenizer]:
    return {name: load_chat_tokenizer(folder) for name, folder in folders.items()}


def pieces(tokenizer: ChatTokenizer, conversation: Conversation) -> list[tuple[str, bool]]:
    """(text, whether it is trained) of each run of tokens."""
    ids, labels = render_pieces(conversation, tokenizer)
    found: list[tuple[list[int], bool]] = []
    for token, label in zip(ids.tolist(), labels.tolist(), strict=True):
        assert label in (IGNORE, token)
        if not found or found[-1][1] != (label != IGNORE):
            found.append(([], label != IGNORE))
        found[-1][0].append(token)
    return [(tokenizer.tokenizer.decode(run, skip_special_tokens=False), trained) for run, trained in found]


def test_borders_and_masks_of_hermes_and_qwen(tokenizers: dict[str, ChatTokenizer]) -> None:
    described = "".join("\n" + json.dumps(tool, ensure_ascii=False) for tool in tool_rows.TOOLS)
    told = json.dumps(tool_rows.ARGUMENTS, ensure_ascii=False)
    assert pieces(tokenizers["hermes"], TALK) == [
        (
            f"<|im_start|>system\nBe brief.\n\nYou may call these functions:\n<tools>{described}\n</tools>\n"
            'A call is one JSON object in tags:\n<tool_call>\n{"name": ..., "arguments": {...}}\n</tool_call><|im_end|>\n'
            "<|im_start|>user\nHow warm?<|im_end|>\n<|im_start|>assistant\n",
            False,
        ),
        (f'<tool_call>\n{{"name": "weather", "arguments": {told}}}\n</tool_call><|im_end|>', True),
        (
            '\n<|im_start|>user\n<tool_response>\n{"celsius": "21"}\n</tool_response><|im_end|>\n<|im_start|>assistant\n',
            False,
        ),
        ("21 °C.<|im_end|>", True),
    ]
    _, first, results, last = pieces(tokenizers["hermes"], PARALLEL)
    clock = '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call><|im_end|>'
    assert first == (
        f'Let me see.\n<tool_call>\n{{"name": "weather", "arguments": {told}}}\n</tool_call>\n{clock}',
        True,
    )
    assert results == (
        "\n<|im_start|>user\n<tool_response>\n21\n</tool_response>\n<tool_response>\nnoon\n</tool_response>"
        "<|im_end|>\n<|im_start|>assistant\n",
        False,
    )
    assert last == (clock, True)


def test_borders_and_masks_of_llama(tokenizers: dict[str, ChatTokenizer]) -> None:
    prompt, call, result, answer = pieces(tokenizers["llama31"], TALK)
    described = "".join(json.dumps(tool, ensure_ascii=False, indent=4) + "\n\n" for tool in tool_rows.TOOLS)
    assert prompt == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nEnvironment: ipython\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nAnswer with a JSON function call where one helps.\n\n"
        f"{described}How warm?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        False,
    )
    told = json.dumps(tool_rows.ARGUMENTS, ensure_ascii=False)
    assert call == (f'{{"name": "weather", "parameters": {told}}}<|eot_id|>', True)
    assert result == (
        '<|start_header_id|>ipython<|end_header_id|>\n\n"{\\"celsius\\": \\"21\\"}"<|eot_id|>'
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        False,
    )
    assert answer == ("21 °C.<|eot_id|>", True)


def test_weight_0_and_the_last_turn_alone(tokenizers: dict[str, ChatTokenizer]) -> None:
    trained = [
        text for text, is_trained in pieces(tokenizers["hermes"], TALK.last_turn_trained()) if is_trained
    ]
    assert trained == ["21 °C.<|im_end|>"]
    assert render_example(TALK, tokenizers["hermes"], 9999).num_targets > 20


def test_a_prompt_is_what_was_trained_on(tokenizers: dict[str, ChatTokenizer]) -> None:
    for conversation in (TALK, TALK.first(3), PARALLEL):
        ids, _ = render_pieces(conversation, tokenizers["hermes"])
        prompt = render_prompt(conversation.prompt(), tokenizers["hermes"])
        assert ids.tolist()[: len(prompt)] == prompt


@pytest.mark.parametrize("name", ["hermes", "llama31"])
def test_nothing_in_tools_becomes_a_control_token(tokenizers: dict[str, ChatTokenizer], name: str) -> None:
    """Descriptions, names, arguments and results that spell control tokens are text, and stay as they are."""
    tokenizer, forged = tokenizers[name], "<|im_end|><|im_start|><|eot_id|><|start_header_id|>"
    tools = tuple(tool.replace("The time", forged).replace("Today", forged) for tool in TOOLS)
    call = ToolCall("weather", json.dumps({"city": forged, forged: [forged]}), "c1")
    result = Message("tool", forged, call_id="c1")
    messages = (*TALK.messages[:2], Message("assistant", "", calls=(call,)), result, TALK.messages[4])
    forging = Conversation(messages, tools=tools)
    honest, ids = (render_example(talk, tokenizer, 9999).input_ids_T.tolist() for talk in (TALK, forging))
    assert [i for i in ids if i in tokenizer.special_ids] == [i for i in honest if i in tokenizer.special_ids]
    text = tokenizer.tokenizer.decode(ids, skip_special_tokens=False)
    assert text.count(forged) == 2 + 3 + 1


VALUES: Any = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
OBJECTS = st.dictionaries(st.text(max_size=6), VALUES, max_size=3)
NAMES = st.from_regex(r"[a-z_.]{1,12}", fullmatch=True)


def conversations(*, parallel: bool) -> st.SearchStrategy[Conversation]:
    @st.composite
    def make(draw: st.DrawFn) -> Conversation:
        text = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=12)
        messages = [Message("system", draw(text))] if draw(st.booleans()) else []
        for turn in range(draw(st.integers(1, 2))):
            messages.append(Message("user", draw(text)))
            if draw(st.booleans()):
                calls = tuple(
                    ToolCall(draw(NAMES), json.dumps(draw(OBJECTS), ensure_ascii=False), f"{turn}{n}")
                    for n in range(draw(st.integers(1, 3)) if parallel else 1)
                )
                messages.append(
                    Message("assistant", draw(text | st.just("")) if parallel else "", calls=calls)
                )
                messages += [Message("tool", draw(text), call_id=call.id) for call in calls]
            messages.append(Message("assistant", draw(text)))
        functions = [
            {"name": draw(NAMES), "parameters": draw(OBJECTS)} for _ in range(draw(st.integers(0, 2)))
        ]
        tools = [json.dumps({"type": "function", "function": one}, ensure_ascii=False) for one in functions]
        return Conversation(tuple(messages), tools=tuple(tools))

    return make()


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
@pytest.mark.parametrize("name", ["hermes", "llama31"])
def test_the_text_is_transformers_own(
    tokenizers: dict[str, ChatTokenizer], folders: dict[str, Path], name: str, data: st.DataObject
) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    tokenizer = tokenizers[name]
    conversation = data.draw(conversations(parallel=name == "hermes"))
    for open_end in (False, True):
        theirs, _ = render_jinja_template(
            [conversation.as_dicts()],
            tools=conversation.tool_dicts(),
            chat_template=tokenizer.template_text,
            add_generation_prompt=open_end,
            **tokenizer.special_tokens,
        )
        assert tokenizer.render_text(conversation, add_generation_prompt=open_end) == theirs[0]


@pytest.mark.parametrize("name", ["hermes", "llama31"])
def test_a_saved_tokenizer_renders_them_alike(
    tokenizers: dict[str, ChatTokenizer], folders: dict[str, Path], name: str
) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(folders[name])
    ours = tokenizers[name].render_text(TALK, add_generation_prompt=False)
    assert ours == theirs.apply_chat_template(TALK.as_dicts(), tools=TALK.tool_dicts(), tokenize=False)


def with_template(tokenizer: ChatTokenizer, template: str) -> ChatTokenizer:
    return ChatTokenizer(tokenizer.tokenizer, template, tokenizer.special_tokens)


def lost(tokenizer: ChatTokenizer, template: str, conversation: Conversation) -> ModelError:
    with pytest.raises(ModelError) as caught:
        render_example(conversation, with_template(tokenizer, template), 9999)
    assert caught.value.code == "lost-tools"
    return caught.value


TALKS = (
    TALK,
    TALK.first(3),
    Conversation(TALK.messages[1:], tools=()),
    Conversation(TALK.messages[:2] + TALK.messages[4:], tools=TOOLS),
)


@pytest.mark.parametrize("name", sorted({*TEMPLATES, "chatml", "plain"}))
def test_a_template_that_knows_no_tools_is_refused(tokenizers: dict[str, ChatTokenizer], name: str) -> None:
    template = {**TEMPLATES, "chatml": tiny.CHATML, "plain": PLAIN_TEMPLATE}[name]
    for conversation in TALKS:
        assert "chat_template.jinja" in str(lost(tokenizers["hermes"], template, conversation).help)


def test_what_a_template_drops_is_named(tokenizers: dict[str, ChatTokenizer]) -> None:
    parts = (
        "(tool | tojson)",
        "(call['function']['name'] | tojson)",
        "(call['function']['arguments'] | tojson)",
        "'\\n<tool_response>\\n' + message['content']",
    )
    assert all(part in HERMES_TOOLS for part in parts)
    said = [lost(tokenizers["hermes"], HERMES_TOOLS.replace(part, "''"), TALK).message for part in parts]
    assert "the tool weather" in said[0] and "the parameters of the tool weather" in said[0]
    assert said[1].endswith(": weather of call 1 in message 3")
    assert said[2].endswith(": city of call 1 in message 3, days of call 1 in message 3")
    assert said[3].endswith(": the result in message 4")
    only_first = HERMES_TOOLS.replace("message['tool_calls'] or []", "(message['tool_calls'] or [])[:1]")
    assert lost(tokenizers["hermes"], only_first, PARALLEL).message.endswith(": clock of call 2 in message 2")


def test_llama_drops_what_is_said_beside_a_call_and_refuses_two(tokenizers: dict[str, ChatTokenizer]) -> None:
    two = lost(tokenizers["llama31"], LLAMA31_TOOLS, PARALLEL)
    assert "only single tool-calls are supported" in two.message
    messages = (*TALK.messages[:2], Message("assistant", "Let me see.", calls=(CALL,)), *TALK.messages[3:])
    said = lost(tokenizers["llama31"], LLAMA31_TOOLS, Conversation(messages, tools=TOOLS))
    assert said.message.endswith("the text beside the calls in message 3")
    assert str(said.help).startswith("take the text out of the turns")


def test_the_commands_name_the_row(myna: Any, tmp_path: Path, tiny_base: Path) -> None:
    plain = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    rows = tiny.write_rows(tmp_path / "rows.jsonl", [plain, tool_rows.row()])
    (tmp_path / "recipe.yaml").write_text(tiny.recipe_text(tiny_base, rows, data={"test_fraction": 0}))
    for command in (("data", "show"), ("train",)):
        done = myna(*command, "recipe.yaml")
        assert done.returncode and "rows.jsonl:2: the base's chat template drops" in done.stderr, done.stderr
        assert "docs/data.md" in done.stderr
    assert not (tmp_path / "runs" / "rows" / "run.json").exists()


def test_a_run_on_rows_with_tools(myna: Any, tmp_path: Path) -> None:
    """Prepared, trained a few steps, its held-out rows kept with their tools, and evaluated."""
    base = tiny.write_base(tmp_path / "base", template=HERMES_TOOLS, max_position_embeddings=1024)
    made = []
    for number in range(6):
        row = tool_rows.row(tools=tool_rows.TOOLS[:1])
        row["messages"][1]["content"] = f"How warm is it in city {number}?"
        made.append({**row, "messages": row["messages"][: 3 if number % 2 else 5]})
    rows = tiny.write_rows(tmp_path / "rows.jsonl", made)
    settings = {"max_steps": 3, "batch_size": 2, "save_every_steps": 9}
    (tmp_path / "recipe.yaml").write_text(
        tiny.recipe_text(base, rows, train=settings, data={"max_length": 1024, "test_fraction": 0.4})
    )
    done = myna("train", "recipe.yaml")
    assert done.returncode == 0, done.stderr
    test = read_conversations(tmp_path / "runs" / "rows" / "rows" / "test.jsonl").conversations
    known = [json.loads(json.dumps(as_row(one))) for one in read_conversations(rows).conversations]
    assert len(test) == 2 and all(as_row(one) in known for one in test)
    losses = [
        json.loads(line)["loss"]
        for line in (tmp_path / "runs" / "rows" / "metrics.jsonl").read_text().splitlines()
    ]
    assert losses[-1] < losses[0]
    shown = myna("data", "show", "recipe.yaml", "--rows", "1")
    assert "«<tool_call>" in shown.stdout and "<tool_response>" in shown.stdout


def test_the_template_of_the_docs_is_the_one_that_is_tested() -> None:
    page = (Path(__file__).parents[1] / "docs" / "data.md").read_text(encoding="utf-8")
    (template,) = re.findall(r"```jinja\n(.*?)\n```", page, re.DOTALL)
    assert template == HERMES_TOOLS

"""Tools in rows: every dress is the same conversation, what does not hold is refused, what is written reads back."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import tool_rows
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tool_rows import ARGUMENTS, CLOCK, TOOLS, WEATHER, call, row

from myna.data.conversation import Conversation, Message, Place, Row, ToolCall
from myna.data.formats import to_conversations
from myna.data.repeats import written
from myna.data.rows import ReadRows, as_row, read_conversations
from myna.data.split import _prompt_digest, drop_overlap
from myna.data.spool import Spool
from myna.data.tool_texts import calls_in_text, results_apart
from myna.errors import DataError


def read(path: Path, *rows: dict[str, Any], **settings: Any) -> ReadRows:
    file = path / "rows.jsonl"
    file.write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")
    return read_conversations(file, **settings)


def one(path: Path, values: dict[str, Any]) -> Conversation:
    found = read(path, values)
    assert not found.faults, found.faults
    (conversation,) = found.conversations
    return conversation


def refused(path: Path, values: dict[str, Any]) -> DataError:
    found = read(path, values)
    (fault,) = found.faults
    assert not found.conversations and str(fault.where).endswith("rows.jsonl:1")
    return fault


def test_the_normal_form(tmp_path: Path) -> None:
    conversation = one(tmp_path, row())
    arguments = json.dumps(ARGUMENTS, ensure_ascii=False)
    assert conversation.messages == (
        Message("system", "Be brief."),
        Message("user", "How warm is it in San José?"),
        Message("assistant", "", calls=(ToolCall("weather", arguments, "c1"),)),
        Message("tool", '{"celsius": 21}', call_id="c1"),
        Message("assistant", "21 °C."),
    )
    assert conversation.tool_dicts() == TOOLS and conversation.uses_tools
    assert conversation.as_dicts()[2]["tool_calls"][0]["function"]["arguments"] == ARGUMENTS
    assert len({conversation.messages, one(tmp_path, row()).messages}) == 1  # hashed
    asked = conversation.prompt().prompt().prompt()
    assert asked.tools == conversation.tools and asked.messages[-1].role == "user"
    assert conversation.with_system("other") == conversation
    last = conversation.last_turn_trained()
    assert last.tools and [m.trained for m in last.messages] == [True, True, False, True, True]


def test_ordinary_rows_have_none_of_it(tmp_path: Path) -> None:
    conversation = one(tmp_path, {"messages": row()["messages"][1:2] + row()["messages"][4:], "tools": []})
    assert not conversation.uses_tools and conversation.tool_dicts() is None
    assert conversation.as_dicts() == [
        {"role": "user", "content": "How warm is it in San José?"},
        {"role": "assistant", "content": "21 °C."},
    ]
    assert as_row(conversation) == {"messages": conversation.as_dicts()}


def without_ids(conversation: Conversation) -> list[Any]:
    return [
        (m.role, m.content, [(c.name, json.loads(c.arguments)) for c in m.calls])
        for m in conversation.messages
    ]


DRESSES = {
    "arguments as an object": row(arguments=ARGUMENTS),
    "no ids": row(ids=False),
    "tools as text": row(tools=json.dumps(TOOLS)),
    "tools as texts": row(tools=[json.dumps(tool) for tool in TOOLS]),
    "bare functions": {**row(tools=None), "functions": [WEATHER, {"type": "function", **CLOCK}]},
    "older": tool_rows.older_row(),
    "typed parts": {
        **row(),
        "messages": [
            {**m, "content": [{"type": "text", "text": m["content"]}] if m["content"] else None}
            for m in row()["messages"]
        ],
    },
    "sharegpt": tool_rows.sharegpt_row(),
    "hermes": tool_rows.hermes_row(),
    "hermes, python": tool_rows.hermes_row(literal=True),
}


@pytest.mark.parametrize("dress", DRESSES)
def test_every_dress_is_the_same_conversation(tmp_path: Path, dress: str) -> None:
    found = one(tmp_path, DRESSES[dress])
    assert without_ids(found) == without_ids(one(tmp_path, row()))
    assert found.tool_dicts() == TOOLS


@pytest.mark.parametrize("dress", [*DRESSES, "parallel"])
def test_what_is_written_reads_back_as_the_same(tmp_path: Path, dress: str) -> None:
    first = one(tmp_path, DRESSES.get(dress) or tool_rows.parallel_row())
    again = one(tmp_path, json.loads(json.dumps(as_row(first))))
    assert (again.messages, again.tools) == (first.messages, first.tools)
    calls = [c for turn in as_row(first)["messages"] for c in turn.get("tool_calls", ())]
    assert calls and all(isinstance(c["function"]["arguments"], str) for c in calls)  # as OpenAI has it


def test_weights_and_text_beside_calls_are_kept(tmp_path: Path) -> None:
    values = row()
    values["messages"][2] |= {"content": "Let me see.", "weight": 0}
    conversation = one(tmp_path, values)
    assert conversation.messages[2].content == "Let me see." and not conversation.messages[2].trained
    again = one(tmp_path, json.loads(json.dumps(as_row(conversation))))
    assert again.messages == conversation.messages
    hermes = one(tmp_path, tool_rows.hermes_row(said="Let me see.\n"))
    assert hermes.messages[2].content == "Let me see." and hermes.messages[2].calls


def test_tables_hold_them_as_json_texts(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    wanted = one(tmp_path, row())
    cells = {"messages": json.dumps(row()["messages"]), "tools": json.dumps(TOOLS)}
    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(cells))
        writer.writeheader()
        writer.writerow(cells)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([cells]), tmp_path / "texts.parquet")
    structs = [row(), tool_rows.parallel_row()]  # Arrow gives each object the keys of all
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(structs), tmp_path / "structs.parquet")
    for name in ("a.csv", "texts.parquet", "structs.parquet"):
        found = read_conversations(tmp_path / name)
        assert not found.faults, (name, found.faults)
        assert found.conversations[0].messages == wanted.messages, name
        if name != "structs.parquet":
            assert found.conversations[0].tools == wanted.tools
    (clock, weather) = sorted(
        found.conversations[0].tool_dicts() or (), key=lambda tool: tool["function"]["name"]
    )
    assert clock == TOOLS[1]
    assert weather["function"]["parameters"]["properties"] == {
        "city": {"type": "string"},
        "days": {"type": "integer"},
    }


def test_arguments_in_a_struct_lose_what_arrow_added(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [row(arguments={"city": "Lima"}, tools=None), row(arguments={"days": 3}, tools=None)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    found = read_conversations(tmp_path / "a.parquet")
    assert [c.messages[2].calls[0].arguments for c in found.conversations] == [
        '{"city": "Lima"}',
        '{"days": 3}',
    ]
    null = row(arguments={"city": None})  # in JSON null is null
    assert one(tmp_path, null).messages[2].calls[0].arguments == '{"city": null}'
    table = pyarrow.Table.from_pylist([{"messages": json.dumps(null["messages"])}])
    pyarrow.parquet.write_table(table, tmp_path / "b.parquet")
    (told,) = read_conversations(tmp_path / "b.parquet").conversations
    assert told.messages[2].calls[0].arguments == '{"city": null}'


def test_parallel_calls_have_a_result_each(tmp_path: Path) -> None:
    conversation = one(tmp_path, tool_rows.parallel_row())
    assert [m.call_id for m in conversation.messages if m.role == "tool"] == ["b", "a"]
    assert conversation.answer() == '{"name": "clock", "arguments": {}}'
    assert json.loads(conversation.first(2).answer()) == [
        {"name": "weather", "arguments": ARGUMENTS},
        {"name": "clock", "arguments": {}},
    ]


@pytest.mark.parametrize(
    ("role", "value"),
    [
        ("observation", '["21", {"hour": 12}]'),
        ("tool", '<tool_response>\n21\n</tool_response>\n<tool_response>{"hour": 12}</tool_response>'),
    ],
)
def test_one_turn_may_hold_the_results_of_several_calls(tmp_path: Path, role: str, value: str) -> None:
    calls = [{"name": "weather", "arguments": ARGUMENTS}, {"name": "clock", "arguments": {}}]
    turns = [
        {"from": "human", "value": "q"},
        {"from": "function_call", "value": json.dumps(calls)},
        {"from": role, "value": value},
        {"from": "gpt", "value": "a"},
    ]
    conversation = one(tmp_path, {"conversations": turns})
    assert [m.content for m in conversation.messages[2:]] == ["21", '{"hour": 12}', "a"]


def test_tools_that_the_system_text_has_are_not_given_twice(tmp_path: Path) -> None:
    values = tool_rows.hermes_row()
    values["conversations"][0]["value"] = f"Call these: <tools>{json.dumps(TOOLS)}</tools>"
    assert one(tmp_path, values).tools == ()
    values["conversations"][2]["value"] = '<tool_call>{"name": "other", "arguments": {}}</tool_call>'
    assert refused(tmp_path, values).code == "D019"  # and still they are what may be called


def test_keys_that_are_read_are_not_ignored(tmp_path: Path) -> None:
    values = tool_rows.older_row()
    values["messages"][1] |= {"name": "anna", "tool_call_id": None}
    detected = read(tmp_path, values).detected
    assert detected and detected.ignored == ("messages.name", "messages.tool_call_id")
    values = {**row(), "id": 7}
    detected = read(tmp_path, values).detected
    assert detected and detected.ignored == ("id",)


def changed(number: int, turn: dict[str, Any] | None, **values: Any) -> dict[str, Any]:
    """The row with its turn of that number, from 1, changed, or left out."""
    turns = row()["messages"]
    turns[number - 1 : number] = [] if turn is None else [turns[number - 1] | turn]
    return {**row(), "messages": turns, **values}


def calling(*calls: Any) -> dict[str, Any]:
    return changed(3, {"tool_calls": list(calls)})


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    (calling(call(arguments="{not json")), "D019", "call 1, `weather`: the text of `arguments` is no JSON"),
    (calling(call(arguments="[1]")), "D019", "`arguments` is a list, not an object"),
    (calling(call(arguments="")), "D019", "the text of `arguments` is no JSON"),
    (calling(call(arguments=["x"])), "D019", "`arguments` is a list, not an object"),
    (calling({"id": "c1", "function": {"name": "weather"}}), "D019", "`arguments` is missing"),
    (calling(call(arguments='{"a": 1, "a": 2}')), "D004", "the key `a` stands twice"),
    (calling(call(arguments='{"a": NaN}')), "D014", "is no JSON"),
    (calling(call(arguments='{"a": "\\ud83d"}')), "D014", "half a character"),
    (calling(call(arguments="[" * 5000)), "D019", "nested too deeply"),
    (calling(call(name="")), "D019", "names no function"),
    (calling("weather"), "D001", "call 1 is no JSON"),
    ({"messages": "[{"}, "D001", "`messages` is no JSON"),
    ({"messages": "[]"}, "D013", "`messages` holds no messages"),
    (calling(7), "D019", "call 1 is a number, not an object"),
    (calling({"type": "custom", "custom": {}}), "D017", "a call of type `custom` is not supported"),
    (calling({**call(), "id": ["c1"]}), "D014", "the id is a list"),
    (changed(3, {"tool_calls": {"id": "c1"}}), "D019", "`tool_calls` is an object, not a list of calls"),
    (calling(call(), call()), "D019", "two calls have the id `c1`"),
    (calling(call(), call("c2")), "D019", "message 5 comes before the result of a call: c2 (weather)"),
    (calling(call(name="wheather")), "D019", "message 3 calls `wheather`, which the row's tools do not describe"),
    (changed(3, {"function_call": call()["function"]}), "D019", "both `tool_calls` and `function_call`"),
    (changed(2, {"tool_calls": [call()]}), "D019", "message 2 is from user and has `tool_calls`"),
    (changed(4, {"tool_call_id": "OTHER"}), "D019", "message 4 is the result of `OTHER`"),
    (changed(4, {"name": "clock"}), "D019", "message 4 is the result of `c1`"),
    (changed(4, None), "D019", "message 4 comes before the result of a call: c1 (weather)"),
    (changed(3, {"tool_calls": None, "content": "x"}), "D019", "message 4 is a tool's result"),
    (changed(3, {"tool_calls": []}), "D013", "message 3 (assistant) is null"),
    (changed(4, {"content": None}), "D013", "message 4 (tool) is null"),
    (changed(4, {"content": {"celsius": 21}}), "D014", "message 4 (tool) is an object"),
    (changed(4, {"tool_call_id": 1.5}), "D014", "the id is a number"),
    (changed(5, None), "D016", "the last message is from tool: there is no answer to learn"),
    (changed(5, {"role": "user"}), "D016", "message 5 is from user, where assistant should speak"),
    (row(tools="{}"), "D014", "`tools` is an object, not a list of tools"),
    (row(tools="[{]"), "D001", "`tools` is no JSON"),
    (row(tools=[7]), "D014", "tool 1 of `tools` is a number, not an object"),
    (row(tools=[{"type": "function"}]), "D012", "tool 1 of `tools` has no `name`"),
    (row(tools=[{"type": "web_search"}]), "D017", "a tool of type `web_search` is not supported"),
    (row(tools=[*TOOLS, WEATHER]), "D019", "`tools` describes `weather` twice"),
    (
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "<tool_call>{}</tool_call>"}]},
        "D019",
        "names no function",
    ),
    (
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "<tool_call>{"}]},
        "D019",
        "one is not closed",
    ),
    (
        {"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": "f()"}]},
        "D001",
        "message 2 (function_call) is no JSON",
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("values", "code", "says"), REFUSED, ids=lambda value: value[:60] if isinstance(value, str) else ""
)
def test_what_does_not_hold_is_refused(tmp_path: Path, values: dict[str, Any], code: str, says: str) -> None:
    fault = refused(tmp_path, values)
    assert (fault.code, says in fault.message) == (code, True), fault.message
    assert fault.help or code in ("D001", "D004", "D014", "D017", "D013")


def test_a_result_may_be_empty_and_a_call_asked_again(tmp_path: Path) -> None:
    values = changed(4, {"content": ""})
    turns = values["messages"]
    values["messages"] = [*turns[:4], turns[2], {**turns[3], "content": "21"}, turns[4]]
    conversation = one(tmp_path, values)
    assert [m.content for m in conversation.messages if m.role == "tool"] == ["", "21"]


def test_the_nasty_file(shared_data: Path) -> None:
    found = read_conversations(shared_data / "nasty" / "tool_calls.jsonl")
    (good,) = found.conversations
    assert good.place == Place(str(shared_data / "nasty" / "tool_calls.jsonl"), 1) and good.messages[1].calls
    (fault,) = found.faults
    assert fault.code == "D019" and str(fault.where).endswith("tool_calls.jsonl:2")
    assert "no JSON" in fault.message


def test_public_descriptions_are_read(shared_data: Path, tmp_path: Path) -> None:
    lines = (shared_data / "eval" / "bfcl_simple_python.jsonl").read_text(encoding="utf-8").splitlines()
    rows = []
    for entry in map(json.loads, lines):
        ((name, arguments),) = entry["ground_truth"][0].items()
        told = json.dumps({key: values[0] for key, values in arguments.items()})
        answer = {"role": "assistant", "content": None, "tool_calls": [call("x", name, told)]}
        rows.append({"messages": [*entry["question"][0], answer], "functions": entry["function"]})
    found = read(tmp_path, *rows)
    assert len(found.conversations) == len(rows) and not found.faults
    again = read(tmp_path, *map(as_row, found.conversations))
    assert [c.tools for c in again.conversations] == [c.tools for c in found.conversations]


def test_conversations_on_disk_keep_their_tools(tmp_path: Path) -> None:
    made = [one(tmp_path, values) for values in (row(), tool_rows.parallel_row())]
    spool = Spool(tmp_path, held=0)
    spool.extend(made)
    assert list(spool) == made and spool[1] == made[1]


def test_digests_know_tools_and_not_ids(tmp_path: Path) -> None:
    base = one(tmp_path, row())
    renamed = one(tmp_path, json.loads(json.dumps(row()).replace('"c1"', '"x9"')))
    others = [
        one(tmp_path, row(arguments={"city": "Lima"})),
        one(tmp_path, row(tools=TOOLS[:1])),
        one(tmp_path, changed(4, {"content": "22"})),
    ]
    digests = [_prompt_digest(c.prompt(), 0) for c in (base, renamed, *others)]
    assert digests[0] == digests[1] and len(set(digests)) == 4
    told = [written(c.messages[:-1], c.tools) for c in (base, renamed, *others)]
    assert told[0] == told[1] and len(set(told)) == 4
    assert drop_overlap([renamed, *others], [base]) == (tuple(others), 1)


def test_digests_of_ordinary_rows_are_what_they_were() -> None:
    """Runs keep their split: the numbers are from before there were tools."""
    plain = Conversation((Message("system", "s"), Message("user", "é\n"), Message("assistant", "a")))
    assert (
        _prompt_digest(plain.prompt(), 7)
        == "28ba63884e8f5ecb3d9131ef7f2a289f41b857a8c089759855ce64ffd56b20f1"
    )
    assert written(plain.messages[:-1]) == "system\x1fs\x1euser\x1fé\n".encode()


SCALARS: Any = st.sampled_from(
    ["", "c1", "f", "{}", '{"a": 1}', "[", "\ud83d", None, True, 0, 1.5, float("inf"), 10**400]
)
ANY: Any = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.sampled_from(["name", "arguments", "function", "id", "type"]), inner)
    ),
    max_leaves=5,
)
ARGUMENTS_AS: Any = st.sampled_from(["{}", '{"a": [1.0]}', {"b": None}, "x"])
CALLS: Any = st.builds(lambda id, arguments: call(id, "f", arguments), SCALARS, ARGUMENTS_AS)


@pytest.mark.parametrize("tail", ["", " ", "x", "<tool_call>", "</tool_response>"])
@pytest.mark.parametrize("unit", ["<tool_call>", "<tool_call> ", " ", "<tool_response>"])
def test_tags_without_an_end_take_no_longer_than_their_length(unit: str, tail: str) -> None:
    text = "<tool_call>" + unit * 20_000 + tail
    with pytest.raises(DataError, match="<tool_call>") as caught:
        calls_in_text(text, "message 2", Place("a.jsonl", 1))
    assert caught.value.code == "D019"
    messages = (Message("assistant", "", calls=(ToolCall("f"),)), Message("tool", text))
    assert len(list(results_apart(messages))) == 2


def test_a_tag_within_a_call_belongs_to_it() -> None:
    told = '{"name": "say", "arguments": {"text": "<tool_call>"}}'
    said, calls = calls_in_text(f"so\n<tool_call> {told} </tool_call>\n", "message 2", Place("a.jsonl", 1))
    assert (said, calls) == ("so", (ToolCall("say", '{"text": "<tool_call>"}'),))


TAGGED = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
VALUES_OF = st.sampled_from(["a", '[{"name": "f", "arguments": {}}]', TAGGED, "[1, 2]"])
TURNS: Any = st.fixed_dictionaries(
    {},
    optional={
        "role": st.sampled_from(["user", "assistant", "tool", "function", "developer", 7]),
        "from": st.sampled_from(["human", "gpt", "function_call", "observation", "tool", None]),
        "content": st.sampled_from(["a", "", None, "<tool_call>{}</tool_call>", 3]),
        "value": VALUES_OF,
        "tool_calls": st.lists(CALLS, max_size=2) | ANY,
        "function_call": ANY,
        "tool_call_id": SCALARS,
        "name": SCALARS,
    },
)


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    turns=st.lists(TURNS, min_size=1, max_size=5),
    tools=st.lists(ANY, max_size=2) | ANY,
    key=st.sampled_from(["messages", "conversations"]),
)
def test_any_values_are_read_or_refused(turns: list[Any], tools: Any, key: str) -> None:
    """Nothing but faults comes of odd values, and what is read is written and read back as the same."""
    place = Place("t.jsonl", 1)
    shape = {"messages": "messages", "conversations": "sharegpt"}[key]
    (found,) = to_conversations(Row({key: turns, "tools": tools}, place), shape, {})
    if isinstance(found, DataError):
        assert found.code and found.place == place
        return
    (again,) = to_conversations(Row(json.loads(json.dumps(as_row(found))), place), "messages", {})
    assert again == found

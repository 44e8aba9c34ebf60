"""What can be wrong with rows, and how it is told: each fault in every format that can carry it, or why one cannot."""

from __future__ import annotations

import gzip
from collections.abc import Mapping
from dataclasses import replace

import pyarrow
from faulty_files import (
    CELLS,
    CHATS,
    CSV,
    CSV_ALONE,
    ENDINGS,
    JSON,
    JSONL,
    NO_JSON,
    NO_NULL,
    OBJECTS,
    ONE_HEADER,
    ONE_TYPE,
    PAIRS,
    PARQUET,
    Fault,
    Planted,
    as_csv,
    as_json,
    as_jsonl,
    as_parquet,
    chat,
    pair,
    parquet_of,
    row_at,
    text_at,
    told,
    turn,
    warned,
    whole,
    without,
)

ONE_OBJECT = "one object on one line|mend the file at that place"
ORDER = "the order is: an optional system message"
FILL = "fill it in, or take the row out"
OBJECT_ROWS = CELLS | {}
CHAT = (JSONL, JSON, PARQUET)


def in_chat(*turns: object, **changes: object) -> dict[str, Planted | str]:
    return row_at(chat(*turns), CHATS, CHAT, **changes) | CELLS


def broken(text: str) -> dict[str, Planted | str]:
    return text_at(text) | NO_JSON


def no_object(text: str) -> dict[str, Planted | str]:
    """A row that is good JSON and no object."""
    planted = text_at(text, num_good=4, num_rows=5)
    return planted | {JSON: replace(planted[JSON], where=": row 3")} | NO_JSON


def cut(content: bytes, ending: str) -> Planted:
    packed = gzip.compress(content, mtime=0)
    return Planted(packed[: len(packed) * 9 // 10], "", num_good=None, ending=f"{ending}.gz")


MANY = [pair(f"question {n}", f"answer {n % 7919}") for n in range(8000)]


def bytes_in(column: list[bytes]) -> bytes:
    """A Parquet file whose prompts are these bytes, called texts."""
    return parquet_of(
        pyarrow.table({"prompt": pyarrow.array(column).view(pyarrow.string()), "completion": ["a"] * 5})
    )


CALL = {"type": "function", "id": "c1", "function": {"name": "look", "arguments": "{}"}}
LONG = " ".join(f"word{n}" for n in range(60))

FAULTS: Mapping[str, Fault] = {
    # what cannot be read as a row
    "a key without quotes": Fault(
        "D001", "column 2: Expecting property name", ONE_OBJECT, broken('{prompt: "q", "completion": "a"}')
    ),
    "a comma after the last key": Fault(
        "D001",
        "column 35: Illegal trailing comma|column 36: Expecting property name",
        ONE_OBJECT,
        broken('{"prompt": "q", "completion": "aa",}'),
    ),
    "a comma that is missing": Fault(
        "D001", "column 16: Expecting ',' delimiter", ONE_OBJECT, broken('{"prompt": "q" "completion": "a"}')
    ),
    "a text that is not ended": Fault(
        "D001",
        "column 3[17]: (Unterminated string|Invalid control character)",
        ONE_OBJECT,
        broken('{"prompt": "q", "completion": "aaaa'),
    ),
    "a tab within a text": Fault(
        "D001",
        "column 33: Invalid control character",
        ONE_OBJECT,
        broken('{"prompt": "q", "completion": "a\tb"}'),
    ),
    "a row that is a list": Fault(
        "D003", "an object with keys; this is a list", "one object", no_object('["q", "a"]')
    ),
    "a row that is null": Fault("D003", "an object with keys; this is null", "one object", no_object("null")),
    "a row that is a number": Fault(
        "D003", "an object with keys; this is a number", "one object", no_object("42")
    ),
    "a key twice": Fault(
        "D004",
        "`prompt` stands twice",
        "take one of the two out",
        no_object('{"prompt": "q", "prompt": "r", "completion": "a"}')
        | without("see a column twice", CSV, PARQUET),
    ),
    "a column twice": Fault(
        "D005",
        "column.*(twice|one name).*prompt",
        "names the columns|a name of its own",
        {
            CSV: Planted(b"prompt,completion,prompt\nq,a,q\n", ":1", num_good=0),
            PARQUET: Planted(
                parquet_of(pyarrow.table([["q"], ["r"]], names=["prompt", "prompt"])),
                "",
                num_good=0,
                num_rows=1,
            ),
        }
        | without("see a key twice", *OBJECTS),
    ),
    "a file of nothing": Fault(
        "D006",
        "holds no rows",
        "write at least one row",
        {
            name: Planted(content, "", num_good=0)
            for name, content in (
                (JSONL, b""),
                (JSON, b"[]"),
                (CSV, b"prompt,completion\n"),
                (PARQUET, parquet_of(pyarrow.table({"prompt": pyarrow.array([], "string")}))),
            )
        },
    ),
    "a byte that is not UTF-8": Fault(
        "D002",
        "byte 0xE9 after 15 characters is not UTF-8|`prompt` cannot be read: .*0xe9",
        "iconv -f WINDOWS-1252 -t UTF-8|write it again",
        text_at(b'{"prompt": "caf\xe9", "completion": "a"}')
        | {
            CSV: Planted(
                as_csv(PAIRS[:2]) + b"a long question\xe9,a\n" + as_csv(PAIRS[2:]).partition(b"\n")[2], ":5"
            ),
            PARQUET: Planted(bytes_in([b"q1", b"q2", b"caf\xe9", b"q4", b"q5"]), ": row 3", code="D014"),
        },
    ),
    "half a character": Fault(
        "D014",
        r"`completion` holds half a character \(surrogate \\ud800\)",
        "whole character|take it out",
        row_at(pair("q", "a \ud800 b"), formats=OBJECTS)
        | without("see a byte that is not UTF-8", CSV, PARQUET),
    ),
    "the character NUL": Fault(
        "D037",
        r"holds the character NUL|is a binary file \(a NUL byte in line 7\), not .csv text",
        "take it out|tr -d '.000' < rows.csv > clean-rows.csv",
        told("a\0b") | {CSV: Planted(as_csv([*PAIRS, pair("q", "a\0b")]), "", num_good=0, code="D007")},
    ),
    "a compressed file cut short": Fault(
        "D007",
        "the gzip file is cut short( after row [0-9]+)?$|is no whole Parquet file",
        "fetch or pack it again|write it again",
        {
            JSONL: cut(as_jsonl(MANY), ".jsonl"),
            JSON: replace(cut(as_json(MANY), ".json"), num_good=0),
            CSV: cut(as_csv(MANY), ".csv"),
            PARQUET: Planted(as_parquet(PAIRS)[:-9], "", num_good=0),
        },
    ),
    "another kind of file": Fault(
        "D007",
        "is (a zip file|no whole Parquet file)",
        "unpack it, or convert it to|write it again",
        {name: Planted(b"PK\x03\x04" + bytes(60), "", num_good=0) for name in (JSONL, JSON, CSV, PARQUET)},
    ),
    "a cell too many": Fault(
        "D005",
        r"3 cells where the header has 2 \(prompt, completion\)",
        "in quotes",
        {CSV: Planted(as_csv(PAIRS[:2]) + b"q,a,b\n" + as_csv(PAIRS[2:]).partition(b"\n")[2], ":5")}
        | CSV_ALONE,
    ),
    "a cell too few": Fault(
        "D005",
        r"1 cells? where the header has 2 \(prompt, completion\)",
        "in quotes",
        {CSV: Planted(as_csv(PAIRS[:2]) + b"q\n" + as_csv(PAIRS[2:]).partition(b"\n")[2], ":5")} | CSV_ALONE,
    ),
    "a quote that is not closed": Fault(
        "D005",
        "the rest of the file is not read",
        "close every quote",
        {CSV: Planted(as_csv(PAIRS) + b'q,"a\nand on\n', ":7")} | CSV_ALONE,
    ),
    "a blank header": Fault(
        "D005",
        "the header is blank",
        "the first line names the columns: prompt,completion",
        {CSV: Planted(b" , \nq,a\n", ":1", num_good=0)} | CSV_ALONE,
    ),
    # what is no row of its shape
    "keys of no known shape": Fault(
        "D010",
        "the shape of the rows cannot be told; the keys are: ticket, reply",
        "--set data.columns.prompt=ticket",
        whole([{"ticket": "q", "reply": "a"}, {"ticket": "r", "reply": "b"}], num_rows=2),
    ),
    "a row of another shape": Fault(
        "D011",
        r"this row is Alpaca \(instruction, output\), the others are read as prompt/answer",
        "one shape in one file",
        row_at({"instruction": "q", "output": "a"}, formats=OBJECTS) | ONE_HEADER,
    ),
    "a key that is missing": Fault(
        "D012",
        "`completion` is missing; the keys are: prompt",
        "add `completion` to the row",
        row_at({"prompt": "q"}, formats=OBJECTS) | ONE_HEADER,
    ),
    "a key that is misspelt": Fault(
        "D012",
        "`completion` is missing; the keys are: prompt, compleiton",
        "rename it in this row or.*data.columns.completion=compleiton",
        row_at({"prompt": "q", "compleiton": "a"}, formats=OBJECTS) | ONE_HEADER,
    ),
    "a column that is misspelt": Fault(
        "D012",
        "`completion` is missing; the keys are: prompt, compleiton",
        "--set data.columns.completion=compleiton",
        whole([{"prompt": "q", "compleiton": "a"}] * 2),
    ),
    "a prompt that is null": Fault(
        "D013", "`prompt` is null", FILL, row_at({"prompt": None, "completion": "a"}, formats=CHAT) | NO_NULL
    ),
    "a completion that is null": Fault(
        "D013", "`completion` is null", FILL, row_at(pair("q", None), formats=CHAT) | NO_NULL
    ),
    "a prompt that is empty": Fault("D013", "`prompt` is empty", FILL, row_at(pair(""))),
    "a completion that is empty": Fault("D013", "`completion` is empty", FILL, row_at(pair("q", ""))),
    "a completion of white space": Fault("D013", "`completion` is empty", FILL, row_at(pair("q", " \n\t "))),
    "a completion that is a list": Fault(
        "D014",
        "`completion` is a list, not a text",
        "a text",
        row_at(pair("q", ["a", "b"]), formats=OBJECTS)
        | CELLS
        | whole([pair("q", ["a"]), pair("r", ["b"])], [PARQUET]),
    ),
    "a completion that is an object": Fault(
        "D014",
        "`completion` is an object, not a text",
        "a text",
        row_at(pair("q", {"text": "a"}), formats=OBJECTS)
        | CELLS
        | whole([pair("q", {"text": "a"}), pair("r", {"text": "a"})], [PARQUET]),
    ),
    "a completion that is NaN": Fault(
        "D014",
        "`completion` is (NaN|a number), not a text",
        "a text|NaN",
        row_at(pair("q", float("nan")), formats=OBJECTS)
        | CELLS
        | {PARQUET: Planted(as_parquet([pair("q", 1.0), pair("r", float("nan"))]), ": row 2", num_good=1)},
    ),
    # conversations
    "an unknown role": Fault(
        "D015",
        "message 2: the role `narrator` is not known",
        "system, user|rename",
        in_chat("user: q", "narrator: a"),
    ),
    "a role that is missing": Fault(
        "D015", "message 2 has no `role`", "role", in_chat("user: q", {"content": "a"})
    ),
    "a message without content": Fault(
        "D012",
        r"message 2 (has no `content`|\(assistant\) is null)",
        "to the row|fill it in",
        in_chat("user: q", {"role": "assistant"})
        | row_at(chat("user: q", {"role": "assistant"}), CHATS, [PARQUET], code="D013"),
    ),
    "two turns of the user": Fault(
        "D016",
        "message 2 is from user, where assistant should speak",
        ORDER,
        in_chat("user: q", "user: r", "assistant: a"),
    ),
    "the assistant first": Fault(
        "D016",
        "message 1 is from assistant, where user should speak",
        ORDER,
        in_chat("assistant: a", "user: q", "assistant: b"),
    ),
    "a late system message": Fault(
        "D016",
        "message 3 is from system, where user should speak",
        ORDER,
        in_chat("user: q", "assistant: a", "system: s", "user: r", "assistant: b"),
    ),
    "a question at the end": Fault(
        "D016",
        "the last message is from user: there is no answer to learn",
        ORDER,
        in_chat("user: q", "assistant: a", "user: r"),
    ),
    "a system message alone": Fault(
        "D016", "the last message is from system: there is no answer to learn", ORDER, in_chat("system: s")
    ),
    "no messages": Fault("D013", "`messages` holds no messages", "take the row out", in_chat()),
    "messages that are no list": Fault(
        "D014",
        "`messages` is a text, not a list of messages",
        '"role"',
        row_at({"messages": "q"}, CHATS, OBJECTS)
        | whole([{"messages": "q"}, {"messages": "r"}], (CSV, PARQUET)),
    ),
    "a message that is no object": Fault(
        "D014",
        "message 2 is a text, not an object",
        '"role"',
        row_at({"messages": [turn("user"), "a"]}, CHATS, OBJECTS) | CELLS | ONE_TYPE,
    ),
    "an image": Fault(
        "D017",
        "message 1: a content part of `image_url` is not supported yet",
        "take",
        row_at(
            chat(turn("user", [{"type": "image_url", "image_url": {"url": "x"}}]), "assistant: a"),
            CHATS,
            OBJECTS,
        )
        | CELLS
        | whole(
            [chat(turn("user", [{"type": "image_url"}]), turn("assistant", [{"type": "text"}]))] * 2,
            [PARQUET],
        ),
    ),
    "a weight of 2": Fault(
        "D014",
        "message 2: `weight` is 2",
        "make it 0 or 1",
        in_chat("user: q", turn("assistant", "a") | {"weight": 2}),
    ),
    "a result that nothing calls": Fault(
        "D019", "message 2 is a tool's result", "tool_calls", in_chat("user: q", "tool: 7", "assistant: a")
    ),
    "a call that gets no result": Fault(
        "D019",
        "message 3 comes before the result of a call",
        "one result for each",
        row_at(
            chat("user: q", turn("assistant") | {"tool_calls": [CALL]}, "user: r", "assistant: a"),
            CHATS,
            OBJECTS,
        )
        | CELLS
        | whole(
            [chat("user: q", turn("assistant") | {"tool_calls": [CALL]}, "user: r", "assistant: a")] * 2,
            [PARQUET],
        ),
    ),
    "a pair of equal answers": Fault(
        "D018",
        "the same",
        "another|take",
        row_at(
            {"prompt": "q", "chosen": "a", "rejected": "a"},
            [{"prompt": f"q{n}", "chosen": "a", "rejected": "b"} for n in range(4)],
        )
        | {
            CSV: Planted(
                as_csv(
                    [{"prompt": f"q{n}", "chosen": "a", "rejected": "a" if n == 2 else "b"} for n in range(5)]
                ),
                ":4",
            )
        },
    ),
    # warnings
    "a row twice": Fault(
        "D030", "the same conversation as (row )?[12]$", "take the copies out", warned([*PAIRS, PAIRS[0]])
    ),
    "one prompt, two answers": Fault(
        "D031",
        "the same prompt as (row )?[12], another answer",
        "keep one answer",
        warned([*PAIRS, PAIRS[0] | {"completion": "b"}]),
    ),
    "a prompt of the test rows": Fault(
        "D032",
        "its prompt stands in the test rows too",
        "left out",
        warned([*PAIRS, pair("held out")], test=as_jsonl([pair("held out", "b")])),
    ),
    "nearly the same conversation": Fault(
        "D038",
        "nearly the same words as (row )?[12]",
        "near|copies|keep",
        warned([pair(LONG, "an answer"), *PAIRS, pair(LONG + " thanks", "an answer")]),
    ),
    "one answer nearly always": Fault(
        "D033",
        "95% of the rows have one answer of 2",
        "add rows with the other answers",
        warned([pair(f"q{n}", "no" if n % 20 else "yes") for n in range(60)], where="all rows"),
    ),
    "a control token": Fault(
        "D034",
        "a turn of the assistant spells a control token",
        "make its turns messages of their own",
        told("well <|im_end|> then"),
    ),
    "two alphabets in a word": Fault(
        "D035", "two alphabets", "write it in one alphabet", told("p\u0430ssword")
    ),
    "a private key": Fault(
        "D036", "a turn holds a private key", "replace it", told("-----BEGIN " + "PRIVATE KEY-----")
    ),
    "an access key": Fault(
        "D036", "a turn holds an access key", "replace it", told("AKIA" + "IOSFODNN7EXAMPLE")
    ),
    "a card number": Fault(
        "D036", "a turn holds a card number", "replace it", told("pay with 4111 1111 1111 1111")
    ),
    "an IBAN": Fault(
        "D036", "a turn holds an IBAN", "replace it", told("to DE89 3704 0044 0532 0130 00 please")
    ),
    "an e-mail address": Fault(
        "D036", "a turn holds an e-mail address", "replace it", told("ask jane@example.com")
    ),
}


def as_markdown() -> str:
    """The table of docs/data-faults.md: where each fault is told in each format, or why it cannot be in it."""
    lines = [f"| fault | code | {' | '.join(ENDINGS)} |", "| --- " * (len(ENDINGS) + 2) + "|"]
    for name, fault in FAULTS.items():
        cells = [_cell(fault.files[form]) for form in ENDINGS]
        lines.append(f"| {name} | {fault.code} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(file: Planted | str) -> str:
    if isinstance(file, str):
        return f"–: {file}"
    unit = {"": "file", ":": "line"}.get(file.where[:1] if not file.where.startswith(": ") else file.where)
    unit = unit or ("row" if "row " in file.where else file.where)
    return f"{unit}, {file.code}" if file.code else unit

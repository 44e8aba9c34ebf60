"""Traps that rows set: each was walked into once."""

from __future__ import annotations

import base64
import gzip
import json
from pathlib import Path
from typing import Any

import openpyxl
import pyarrow
import pyarrow.parquet
import pytest
from conftest import Command

from myna.data.quarantine import quarantine_lines
from myna.data.review import review_rows
from myna.data.rows import load_conversations, load_rows, read_conversations
from myna.data.shapes import Reading
from myna.data.sources import digest_of, read_rows
from myna.data.warned import TWO_SCRIPTS
from myna.errors import DataError
from myna.recipe import build_recipe
from myna.settings import DataSettings
from myna.stored import run_of

GOOD = {"prompt": "q", "completion": "a"}


def write(path: Path, *rows: Any) -> Path:
    lines = (row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def answers(path: Path, **settings: Any) -> list[str]:
    return [c.answer() for c in read_conversations(path, **settings).conversations]


# What a table has for true, and for numbers


@pytest.mark.parametrize("cell", ["False", "0", "", "True", "1"])
def test_an_answer_of_a_table_is_impossible_where_it_says_so(tmp_path: Path, cell: str) -> None:
    path = write(tmp_path / "a.csv", "context,question,answer,is_impossible", f"c,q,a,{cell}")
    assert answers(path) == ["unanswerable" if cell in ("True", "1") else "a"]


def test_ranks_and_flags_of_replies_in_a_table(tmp_path: Path) -> None:
    head = "message_id,parent_id,role,text,rank,deleted"
    rows = (
        "1,,prompter,q,,False",
        "2,1,assistant,worse,1,False",
        "3,1,assistant,gone,0,True",
        "4,1,assistant,best,0,False",
    )
    assert answers(write(tmp_path / "a.csv", head, *rows)) == ["best"]


def test_a_rank_beyond_all_numbers_is_none(tmp_path: Path) -> None:
    reply = '{"text": "a", "role": "assistant", "replies": [], "rank": 1' + "0" * 400 + "}"
    path = write(
        tmp_path / "a.jsonl", '{"prompt": {"text": "q", "role": "prompter", "replies": [' + reply + "]}}"
    )
    assert answers(path) == ["a"]


# Answers that are no answers


@pytest.mark.parametrize("given", [{"answer": ["x"]}, {}])
def test_answers_of_an_unknown_dress_are_no_refusal_to_answer(tmp_path: Path, given: Any) -> None:
    read = read_conversations(
        write(tmp_path / "a.jsonl", {"context": "c", "question": "q", "answers": given})
    )
    assert [fault.code for fault in read.faults] == ["D012"] and not read.conversations


def test_bad_answers_are_not_converted_or_offered_as_good_ones(myna: Command, tmp_path: Path) -> None:
    rows = [GOOD | {"label": label} for label in (True, False, None)]
    write(tmp_path / "a.jsonl", *rows)
    done = myna("data", "convert", "a.jsonl", "-o", "b.jsonl")
    assert done.returncode == 3 and "not trained on yet" in done.stderr and "data.format=" not in done.stderr
    assert "not trained on yet" in myna("data", "check", "a.jsonl", "--on-bad-row", "skip").stdout
    write(tmp_path / "a.csv", "prompt,completion,label", "q,a,True", "q,b,False")
    assert review_rows(tmp_path / "a.csv").trained is False


# What ends before its end


ENDS: dict[str, bytes] = {
    "a.csv": b'prompt,completion\nq,a\n"open,\nq,b\n',
    "a.json": b'[{"prompt": "q", "completion": "a"}, {"prompt" 1}]',
    "a.jsonl.gz": gzip.compress(b'{"prompt": "q", "completion": "a"}\n' * 90_000)[:900],
}


@pytest.mark.parametrize("name", ENDS)
def test_the_beginning_of_a_broken_file_is_not_taken_for_all_of_it(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(ENDS[name])
    with pytest.raises(DataError):
        load_conversations(tmp_path / name, skip_bad=True)


def test_a_packed_file_that_is_cut_after_a_faulty_row_can_be_told_of(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    content = b"broken\n" + b"".join(b'{"prompt": "q%d", "completion": "a"}\n' % n for n in range(90_000))
    path.write_bytes(gzip.compress(content)[:200_000])
    read = read_conversations(path)
    assert [fault.code for fault in read.faults] == ["D001", "D007"]
    assert [json.loads(line)["row"] for line in quarantine_lines(read.faults)] == ["broken\n", None]


# The first rows alone


def test_the_first_rows_of_flat_replies_are_whole_threads(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = []
    for n in range(6):
        rows.append({"message_id": f"a{n}", "parent_id": f"q{n}", "text": f"a{n}", "role": "assistant"})
    rows += [
        {"message_id": f"q{n}", "parent_id": None, "text": f"q{n}", "role": "prompter"} for n in range(6)
    ]
    path = write(tmp_path / "a.jsonl", *rows)
    assert [c.answer() for c in load_conversations(path, max_rows=2).conversations] == ["a0", "a1"]


def test_the_first_rows_of_a_language_are_of_all_rows(tmp_path: Path) -> None:
    def tree(n: int, lang: str) -> dict[str, Any]:
        reply = {"text": f"a{n}", "role": "assistant", "replies": [], "lang": lang}
        return {"prompt": {"text": "q", "role": "prompter", "lang": lang, "replies": [reply]}}

    path = write(tmp_path / "a.jsonl", *(tree(n, "en") for n in range(9)), tree(9, "de"))
    assert answers(path, max_rows=3, reading=Reading(language="de")) == ["a9"]


def test_replies_to_what_is_missing_are_all_told_of(tmp_path: Path) -> None:
    rows = [
        {"message_id": "x", "parent_id": "nobody", "text": "x", "role": "assistant"},
        {"message_id": "y", "parent_id": "x", "text": "y", "role": "prompter"},
        {"message_id": "z", "parent_id": "y", "text": "z", "role": "assistant"},
    ]
    read = read_conversations(write(tmp_path / "a.jsonl", *rows))
    assert [(fault.code, str(fault.where)[-1]) for fault in read.faults] == [
        ("D012", "1"),
        ("D016", "2"),
        ("D016", "3"),
    ]


# A run goes on with the rows that it began with


def test_a_run_s_rows_are_read_as_they_were(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"context": "c", "question": "q", "answer": "a"})
    before = {"sha256": digest_of(path), "format": "prompt_answer", "rows": 1}
    settings = DataSettings(train=str(path))
    assert load_rows(path, settings).format_name == "squad_flat"
    assert load_rows(path, settings, known=before).format_name == "prompt_answer"
    assert load_rows(path, settings, known=before | {"sha256": "of another file"}).format_name == "squad_flat"


def test_answers_of_weight_0_are_not_what_is_measured_by(
    myna: Command, tmp_path: Path, tiny_base: Path
) -> None:
    def row(n: int) -> dict[str, Any]:
        turn = {"role": "assistant", "content": f"a{n}"}
        turns = [{"role": "user", "content": f"q{n}"}, turn | ({"weight": 0} if n % 2 else {})]
        return {"messages": turns}

    write(tmp_path / "rows.jsonl", *map(row, range(24)))
    settings = "train: {max_steps: 1, batch_size: 2}\ndata: {train: rows.jsonl, test_fraction: 0.5}\n"
    (tmp_path / "recipe.yaml").write_text(f"model: {{base: {tiny_base}}}\n{settings}")
    done = myna("train", "recipe.yaml")
    assert done.returncode == 0, done.stderr
    kept = (tmp_path / "runs" / "rows" / "rows" / "test.jsonl").read_text()
    assert "weight" not in kept and len(kept.splitlines()) < 12 and "answer of weight 0" in done.stderr


# Values that Python or JSON has not


def test_a_column_with_bytes_that_are_no_text_is_a_faulty_row(tmp_path: Path) -> None:
    column = pyarrow.array([b"q", b"\xff\xfe", b"r"]).view(pyarrow.string())
    table = pyarrow.table({"prompt": column, "completion": ["a", "b", "c"]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    read = read_conversations(tmp_path / "a.parquet")
    assert [(fault.code, str(fault.where)[-1]) for fault in read.faults] == [("D014", "2")]
    assert answers(tmp_path / "a.parquet") == ["a", "c"]


def test_half_characters_in_rows_and_ids_can_be_kept(tmp_path: Path) -> None:
    question = {"id": "\ud800", "question": "", "answers": []}
    rows = [{"paragraphs": [{"context": "c", "qas": [question]}]}]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "b.json").write_text(json.dumps([{"prompt": "\ud800", "completion": "x"}]))
    for name in ("a.json", "b.json"):
        lines = list(quarantine_lines(read_conversations(tmp_path / name).faults))
        assert len(lines) == 1 and lines[0].encode() and json.loads(lines[0])["row"]


def test_a_key_twice_is_found_however_deep(tmp_path: Path) -> None:
    deep = "[" * 700 + '{"a": 1, "a": 2}' + "]" * 700
    for name, text in (("a.jsonl", f'{{"x": {deep}}}'), ("a.json", f'[{{"x": {deep}}}]')):
        read = read_conversations(write(tmp_path / name, text))
        assert [fault.code for fault in read.faults] == ["D004"]


# Tables


def test_a_sheet_with_cells_beyond_its_header_is_not_cut(tmp_path: Path) -> None:
    book = openpyxl.Workbook()
    for row in (["prompt", "completion"], ["q", "a"], ["q", "a", "more"]):
        book.active.append(row)
    book.save(tmp_path / "a.xlsx")
    read = read_conversations(tmp_path / "a.xlsx")
    assert [(fault.code, str(fault.where)[-1]) for fault in read.faults] == [("D005", "3")]


def test_a_damaged_book_is_said_wherever_the_damage_is(tmp_path: Path) -> None:
    book = openpyxl.Workbook()
    for row in (["prompt", "completion"], *([f"q{n}", "a"] for n in range(40))):
        book.active.append(row)
    book.save(tmp_path / "a.xlsx")
    whole = (tmp_path / "a.xlsx").read_bytes()
    for at in range(0, len(whole), 97):
        (tmp_path / "b.xlsx").write_bytes(whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :])
        review_rows(tmp_path / "b.xlsx")


def test_a_first_line_longer_than_the_csv_module_likes(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "prompt," + "x" * 300_000, "q,a")
    assert [row.values["prompt"] for row in read_rows(path)] == ["q"]


def test_other_signs_in_a_header_do_not_part_it(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "prompt,completion (a;b;c;d)", "q,a")
    assert next(read_rows(path)).values == {"prompt": "q", "completion (a;b;c;d)": "a"}


# Documents


def test_lists_inside_of_rows_are_not_the_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"meta": {"authors": [{"name": "x"}]}, "data": [GOOD]}))
    assert answers(path) == ["a"]
    tree = {"text": "q", "role": "prompter", "replies": [{"text": "a", "role": "assistant", "replies": []}]}
    path.write_text(json.dumps({"message_tree_id": "t", "prompt": tree}, indent=1))
    assert answers(path) == ["a"]
    path.write_text(
        json.dumps(
            {"title": "t", "paragraphs": [{"context": "c", "qas": [{"question": "q", "answers": ["a"]}]}]}
        )
    )
    assert answers(path) == ["a"]


def test_text_that_begins_like_a_packed_file_is_text(tmp_path: Path) -> None:
    assert next(read_rows(write(tmp_path / "a.csv", "BZh,b", "1,2"))).values == {"BZh": "1", "b": "2"}


# Folders and names


def test_one_bad_file_of_a_folder_does_not_hide_the_others(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", "broken", GOOD)
    (tmp_path / "b.json").write_text('"no rows"')
    (tmp_path / "c.jsonl").write_text("")
    write(tmp_path / "d.jsonl", GOOD)
    write(tmp_path / "old.quarantine.jsonl", "set aside")
    read = read_conversations(tmp_path)
    assert [fault.code for fault in read.faults] == ["D001", "D003", "D006"] and len(read.conversations) == 2


def test_no_file_is_opened_after_the_last_row_that_is_asked_for(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", GOOD, GOOD | {"prompt": "r"})
    (tmp_path / "b.jsonl").write_text("")
    assert len(list(read_rows(tmp_path, max_rows=2))) == 2
    with pytest.raises(DataError):
        list(read_rows(tmp_path))


def test_a_recipe_may_train_the_last_turns_alone(tmp_path: Path) -> None:
    turns = [("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "b")]
    path = write(
        tmp_path / "a.jsonl", {"messages": [{"role": role, "content": text} for role, text in turns]}
    )
    for train_on, trained in (("all", [True] * 4), ("last", [True, False, True, True])):
        settings = DataSettings.model_validate({"train": str(path), "train_on": train_on})
        (conversation,) = load_rows(path, settings).conversations
        assert [message.trained for message in conversation.messages] == trained


def test_the_digest_of_a_folder_sees_a_file_move(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    write(tmp_path / "a" / "x.jsonl", GOOD)
    before = digest_of(tmp_path)
    (tmp_path / "a" / "x.jsonl").rename(tmp_path / "b" / "x.jsonl")
    assert digest_of(tmp_path) != before


def test_a_name_with_brackets_is_a_name_where_there_is_such_a_file(tmp_path: Path) -> None:
    path = write(tmp_path / "rows[1].jsonl", GOOD)
    assert run_of(build_recipe({"data": {"train": str(path)}})).name == "rows[1]"
    assert [row.values for row in read_rows(path)] == [GOOD]
    assert (
        run_of(build_recipe({"data": {"train": str(tmp_path / "orders" / "**" / "*.jsonl")}})).name
        == "orders"
    )


def test_a_run_of_a_folder_of_rows_is_verified_whole(myna: Command, tmp_path: Path, tiny_base: Path) -> None:
    (tmp_path / "rows").mkdir()
    for name in ("a", "b"):
        write(
            tmp_path / "rows" / f"{name}.jsonl",
            *({"prompt": f"{name}{n}", "completion": "x"} for n in range(6)),
        )
    settings = "train: {max_steps: 1, batch_size: 2}\ndata: {train: rows}\n"
    (tmp_path / "recipe.yaml").write_text(f"model: {{base: {tiny_base}}}\n{settings}")
    done = myna("train", "recipe.yaml")
    assert done.returncode == 0, done.stderr
    assert "rows: 2 files: 12 rows" in done.stderr
    assert myna("verify", "rows").returncode == 0
    write(tmp_path / "rows" / "b.jsonl", GOOD)
    assert myna("verify", "rows").returncode == 5
    assert myna("train", "recipe.yaml", "--resume").returncode == 2


def test_the_check_of_the_current_folder_and_of_a_pattern(myna: Command, tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", GOOD, "broken")
    assert myna("data", "check", ".").returncode == 3
    assert myna("data", "check", "*.jsonl", "--on-bad-row", "quarantine").returncode == 0
    (kept,) = tmp_path.glob("*.quarantine.jsonl")
    assert "*" not in kept.name
    assert myna("data", "check", ".", "--on-bad-row", "skip", "--json").returncode == 0


def test_rows_converted_onto_themselves_keep_what_was_wrong(myna: Command, tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", GOOD, "broken")
    done = myna("data", "convert", "a.jsonl", "-o", "a.jsonl", "--yes", "--on-bad-row", "quarantine")
    assert done.returncode == 0
    assert json.loads((tmp_path / "a.quarantine.jsonl").read_text())["row"] == "broken\n"


def test_faults_of_the_test_rows_are_told_too(myna: Command, tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", GOOD)
    (tmp_path / "recipe.yaml").write_text("data: {train: rows.jsonl, test: test.jsonl}\n")
    write(tmp_path / "test.jsonl", "broken", GOOD | {"prompt": "other"})
    told = json.loads(myna("data", "check", "recipe.yaml", "--json").stdout)
    assert told["num_errors"] == 1 and told["num_rows"] == 1
    (tmp_path / "test.jsonl").unlink()
    told = json.loads(myna("data", "check", "recipe.yaml", "--json").stdout)
    assert [finding["code"] for finding in told["findings"]] == ["D007"] and told["num_rows"] == 1


def test_a_bad_byte_within_a_record_is_kept_with_the_record(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b'prompt,completion\n"one\ntwo \xe9",a\nq,a\n')
    (line,) = quarantine_lines(read_conversations(path).faults)
    assert base64.b64decode(json.loads(line)["row_base64"]) == b'"one\ntwo \xe9",a\n'


def test_a_long_text_of_one_alphabet_is_looked_through_at_once() -> None:
    """A pattern that tries every start again would take hours over it."""
    assert TWO_SCRIPTS.search("ACGT" * 500_000) is None

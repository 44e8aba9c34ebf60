"""Public rows in many dresses, and odd and broken files, where a checkout has them beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from myna.data.render import IGNORE, load_chat_tokenizer, render_example
from myna.data.rows import ReadRows, load_conversations, read_conversations
from myna.data.shapes import Reading
from myna.data.sides import read_sides
from myna.errors import DataError
from myna.metrics import read_lines
from myna.model.sources import resolve_base
from myna.pipeline import train_stage
from myna.recipe import build_recipe

# what each file of formats/ is found to be
DRESSES: dict[str, str] = {
    **dict.fromkeys(
        (
            "alpaca.arrow",
            "alpaca.csv",
            "alpaca.json",
            "alpaca.jsonl",
            "alpaca.jsonl.gz",
            "alpaca.parquet",
            "alpaca.tsv",
        ),
        "alpaca",
    ),
    "alpaca.xlsx": "alpaca",
    "dolly.jsonl": "alpaca",
    "messages.jsonl": "messages",
    "messages.parquet": "messages",
    "messages_system.jsonl": "messages",
    "prompt_completion.jsonl": "prompt_answer",
    "question_answer.jsonl": "prompt_answer",
    "sharegpt.json": "sharegpt",
    "sharegpt_role_content.json": "sharegpt",
}


def there(folder: Path, name: str) -> Path:
    if not (folder / name).exists():
        pytest.skip(f"the shared rows have no {name}")
    return folder / name


@pytest.mark.parametrize("name", DRESSES)
def test_every_dress_is_the_same_rows(shared_data: Path, name: str) -> None:
    path = there(shared_data / "formats", name)
    first = load_conversations(shared_data / "formats" / "question_answer.jsonl").conversations
    loaded = load_conversations(path)
    assert loaded.format_name == DRESSES[name] and loaded.confidence == 1
    assert len(loaded.conversations) == 120
    assert [c.messages[-2:] for c in loaded.conversations] == [c.messages[-2:] for c in first]
    assert {len(c.messages) for c in loaded.conversations} == {3 if name == "messages_system.jsonl" else 2}


def test_text_rows_are_texts(shared_data: Path) -> None:
    loaded = load_conversations(there(shared_data / "formats", "text.jsonl"))
    assert (loaded.format_name, len(loaded.conversations)) == ("text", 120)
    assert all(c.is_text for c in loaded.conversations)
    assert load_conversations(there(shared_data, "text/c4_demo.jsonl")).format_name == "text"
    assert len(load_conversations(there(shared_data, "text/tinyshakespeare.txt")).conversations) == 1


def bad_lines(read: ReadRows) -> list[int]:
    """Lines or row numbers of the faults, each once."""
    numbers = (
        str(error.where).split(",")[0].replace(": row ", ":").rpartition(":")[2] for error in read.faults
    )
    return sorted({int(number) for number in numbers if number.isdigit()})


# name: (conversations that are read, lines with a fault; None: the whole file is refused, by this code)
NASTY: dict[str, tuple[int, list[int] | str]] = {
    "broken_lines.jsonl": (12, [4, 7, 10, 11, 12, 13, 19]),
    "bom_utf8.jsonl": (12, []),
    "crlf.jsonl": (12, []),
    "cr_only.jsonl": (12, []),
    "blank_lines_no_final_newline.jsonl": (12, []),
    "utf16le_bom.jsonl": (12, []),
    "mixed_encodings.jsonl": (3, [2, 4]),
    "empty_conversations.jsonl": (1, [1, 2, 3, 4, 5, 6, 7, 8, 10, 11]),
    "wrong_role_order.jsonl": (1, [1, 2, 3, 4, 5, 6, 7, 8, 9]),
    "duplicates.jsonl": (14, []),
    "very_long_rows.jsonl": (5, []),
    "not_jsonl_but_array.jsonl": (6, []),
    "jsonl_named.json": (6, []),
    "concatenated_objects.json": (4, []),
    "nested_under_data.json": (4, []),
    "openai_export.jsonl": (4, [3]),
    "semicolon.csv": (2, []),
    "one_row.jsonl": (1, []),
    "good.jsonl.gz": (12, []),
    "plain_named.jsonl.gz": (12, []),
    "preference_bad.jsonl": (3, [2, 3, 4, 6]),
    "secrets_and_pii.jsonl": (5, []),
    "empty.jsonl": (0, "D006"),
    "only_whitespace.jsonl": (0, "D006"),
    "no_header.tsv": (0, "D010"),
    "zip_named.jsonl": (0, "D007"),
    "latin1.csv": (0, "D002"),
}


@pytest.mark.parametrize("name", NASTY)
def test_odd_and_broken_files(shared_data: Path, name: str) -> None:
    path, (num_good, faulty) = there(shared_data / "nasty", name), NASTY[name]
    try:
        read = read_conversations(path)
    except DataError as error:
        assert error.code == faulty, error
        return
    assert len(read.conversations) == num_good
    if isinstance(faulty, str):
        assert {error.code for error in read.faults} == {faulty}
    else:
        assert bad_lines(read) == faulty


def test_a_gzip_file_that_is_cut_short_says_so(shared_data: Path) -> None:
    with pytest.raises(DataError, match="the gzip file is cut short") as caught:
        read_conversations(there(shared_data / "nasty", "truncated.jsonl.gz"))
    assert caught.value.code == "D007"


def test_weights_of_turns_are_kept(shared_data: Path) -> None:
    read = read_conversations(there(shared_data / "nasty", "openai_export.jsonl"))
    assert [c.messages[-1].trained for c in read.conversations] == [False, True, True, False]


# name: what its shape is found to be, and how many conversations it holds at least
SETS: dict[str, tuple[str, int]] = {
    "qa/persianqa_test_split.json": ("squad", 300),
    "qa/pquad_validation_part.json": ("squad", 300),
    "qa/xquad.ar.json": ("squad", 100),
    "qa/xquad.en.json": ("squad", 100),
    "qa/xquad.tr.json": ("squad", 100),
    "qa/xquad.zh.json": ("squad", 100),
    "sft/chatterbot_english.jsonl": ("sharegpt", 100),
    "sft/chatterbot_persian.jsonl": ("sharegpt", 100),
    "sft/instruction_data_alpaca.json": ("alpaca", 100),
    "sft/oasst_flat_messages.json": ("flat_tree", 10),
    "sft/oasst_message_trees.jsonl": ("tree", 10),
    "sft/sharegpt_dummy_conversation.json": ("sharegpt", 10),
    "preference/dpo_en.json": ("preference", 200),
    "preference/kto_en.json": ("kto_messages", 200),
    "preference/polite_impolite_pref.json": ("preference", 700),
    "preference/v1_dpo_parts.jsonl": ("preference", 10),
}


@pytest.mark.parametrize("name", SETS)
def test_public_sets_are_read_as_they_are(shared_data: Path, name: str) -> None:
    shape, at_least = SETS[name]
    read = read_conversations(there(shared_data, name))
    assert read.detected and read.detected.name == shape
    assert len(read.conversations) >= at_least
    # rows that end with a question, threads in which one speaker answers himself: said, and not read
    assert {error.code for error in read.faults} <= {"D013", "D016", "D018"}, read.faults[:3]


def test_every_path_of_a_tree_is_more_than_the_best(shared_data: Path) -> None:
    path = there(shared_data, "sft/oasst_message_trees.jsonl")
    best, every = (read_conversations(path, reading=Reading(paths=p)).conversations for p in ("best", "all"))
    assert len(every) > len(best) > 0
    assert {c.messages for c in best} <= {c.messages for c in every}


def test_texts_in_persian_come_through_as_they_stand(shared_data: Path) -> None:
    path = there(shared_data, "qa/persianqa_test_split.json")
    first: Any = json.loads(path.read_text(encoding="utf-8"))["data"][0]["paragraphs"][0]
    conversation = read_conversations(path).conversations[0]
    assert conversation.messages[0].content == f"{first['context']}\n\n{first['qas'][0]['question']}"
    assert conversation.answer() == first["qas"][0]["answers"][0]["text"]


# sets that train, and what is set for each
TRAINED: dict[str, dict[str, Any]] = {
    "qa/persianqa_test_split.json": {},
    "qa/xquad.zh.json": {},
    "sft/oasst_message_trees.jsonl": {"paths": "all", "on_bad_row": "skip"},
    "sft/oasst_flat_messages.json": {"on_bad_row": "skip"},
    "sft/sharegpt_dummy_conversation.json": {},
    "sft/chatterbot_persian.jsonl": {"on_bad_row": "skip"},
    "sft/dolly_long_answers.jsonl": {},
    "formats/text.jsonl": {},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED)
def test_public_sets_train_and_are_rendered_right(
    shared_data: Path, tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    data = {"train": str(there(shared_data, name)), "cut_long": True, **TRAINED[name]}
    # a text with a question is longer than what the tiny one reads
    base = "smollm2-135m" if name.startswith("qa/") else str(tiny_base)
    tree: dict[str, Any] = {"model": {"base": base, "dtype": "fp32"}, "data": data}
    num_steps = 1 if name.startswith("qa/") else 2
    tree["train"] = {"max_steps": num_steps, "max_rows": 20 * num_steps, "batch_size": 2}
    recipe = build_recipe(tree)
    tokenizer = load_chat_tokenizer(resolve_base(base).folder)
    learnt = [one for source in read_sides(recipe, None, lambda _: None).train for one in source.rows]
    for row in learnt[:10]:
        example = render_example(row, tokenizer, 100_000)
        trained = tokenizer.decode([i for i in example.labels_T.tolist() if i != IGNORE])
        assert trained == "".join(m.content for m in row.messages if m.role == "assistant" and m.trained)
    run = train_stage(recipe)
    assert len(read_lines(run.metrics_path)) == num_steps

"""Plain text: found out as it, trained whole and in pieces, ended by EOS, without a chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from conftest import Command

from myna.data.conversation import Conversation, Message
from myna.data.render import IGNORE, ChatTokenizer, load_chat_tokenizer, render_example, render_examples
from myna.data.review import review_rows
from myna.data.rows import as_row, load_conversations, read_conversations
from myna.data.split import drop_overlap, split_rows
from myna.errors import DataError
from myna.stored import held_out, training_rows


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def text(content: str) -> Conversation:
    return Conversation((Message("assistant", content),))


@pytest.fixture(scope="module")
def tokenizer(tiny_base: Path) -> ChatTokenizer:
    return load_chat_tokenizer(tiny_base)


@pytest.mark.parametrize(
    ("row", "shape"),
    [
        ({"text": "t"}, "text"),
        ({"text": "t", "url": "u", "timestamp": "2019", "meta": {"a": "b"}, "score": 3}, "text"),
        ({"text": "t", "label": "spam"}, "classification"),
        ({"text": "t", "label": None, "id": "1"}, "classification"),
        ({"text": "t", "prompt": "p", "completion": "c"}, "prompt_answer"),
    ],
)
def test_it_is_found_out_by_what_stands_beside_it(row: dict[str, Any], shape: str, tmp_path: Path) -> None:
    read = read_conversations(write(tmp_path / "a.jsonl", row))
    assert read.detected and read.detected.name == shape


def test_a_text_that_may_be_half_of_a_pair_has_to_be_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"text": "t", "summary": "s"})
    with pytest.raises(DataError, match="`label` is missing"):
        load_conversations(path)
    loaded = load_conversations(path, format_name="text")
    assert (loaded.conversations[0].messages, loaded.ignored_keys) == (text("t").messages, ("summary",))


def test_every_file_of_text_is_a_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\n\r\ntwo\n")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "b.md").write_text("# three\n")
    loaded = load_conversations(tmp_path)
    assert [c.answer() for c in loaded.conversations] == ["one\n\ntwo\n", "# three\n"]
    assert all(c.is_text for c in loaded.conversations) and "2 rows, plain text" in loaded.said[0]
    (tmp_path / "c.txt").write_text(" \n")
    with pytest.raises(DataError, match="holds no rows"):
        load_conversations(tmp_path)
    (tmp_path / "c.txt").write_bytes(b"fine\ncaf\xe9\n")
    with pytest.raises(DataError, match="byte 0xE9") as caught:
        load_conversations(tmp_path / "c.txt")
    assert caught.value.where == f"{tmp_path / 'c.txt'}:2"


def test_text_beside_files_of_rows_tells_about_them(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# About these rows\n")
    write(tmp_path / "a.jsonl", {"prompt": "q", "completion": "a"})
    assert load_conversations(tmp_path).format_name == "prompt_answer"


def test_it_is_trained_whole_without_a_template(tokenizer: ChatTokenizer) -> None:
    example = render_example(text("Two lamps."), tokenizer, 99)
    assert tokenizer.tokenizer.decode(example.input_ids_T.tolist(), skip_special_tokens=False) == (
        "Two lamps.<|im_end|>"
    )
    assert example.labels_T.tolist() == example.input_ids_T.tolist()
    assert example.num_targets == len(example.input_ids_T) - 1


def test_a_tokenizer_that_begins_texts_with_bos_does_here(tokenizer: ChatTokenizer) -> None:
    from tokenizers import Tokenizer, processors

    with_bos = Tokenizer.from_str(tokenizer.tokenizer.to_str())
    bos = with_bos.token_to_id("<|im_start|>")
    with_bos.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", bos)]
    )
    ids = render_example(
        text("a"), ChatTokenizer(with_bos, tokenizer.template_text, tokenizer.special_tokens), 9
    ).input_ids_T
    assert ids.tolist()[0] == bos and ids.tolist().count(bos) == 1


@pytest.mark.parametrize("max_length", [2, 3, 5, 8, 100])
def test_every_token_of_a_long_text_is_a_target_once(tokenizer: ChatTokenizer, max_length: int) -> None:
    whole = render_example(text("a long text, 1234567890"), tokenizer, 10_000).input_ids_T
    pieces = list(render_examples(text("a long text, 1234567890"), tokenizer, max_length))
    assert max(len(piece.input_ids_T) for piece in pieces) <= max_length
    targets = np.concatenate([piece.labels_T[1:] for piece in pieces])
    assert targets.tolist() == whole[1:].tolist() and IGNORE not in targets
    assert sum(piece.num_targets for piece in pieces) == len(whole) - 1


def test_without_eos_it_is_refused(tokenizer: ChatTokenizer) -> None:
    bare = ChatTokenizer(tokenizer.tokenizer, tokenizer.template_text, {})
    with pytest.raises(DataError, match="no EOS"):
        render_example(text("a"), bare, 9)


def test_equal_texts_stay_on_one_side_and_others_part() -> None:
    rows = [text(f"text {n % 10}") for n in range(20)]
    split = split_rows(rows, test_fraction=0.3, seed=1)
    assert len(split.test) == 6 and not {*split.test} & {*split.train}
    assert drop_overlap(rows, split.test)[1] == 6


def test_texts_have_no_prompt_to_warn_of(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"text": "a"}, {"text": "b"}, {"text": "a"})
    test = write(tmp_path / "test.jsonl", {"text": "b"})
    found = {finding.code: finding.count for finding in review_rows(path, test=test).findings}
    assert found == {"D030": 1, "D032": 1}


def test_a_system_text_is_not_put_before_it_and_it_is_written_as_it_is() -> None:
    assert text("a").with_system("be brief") == text("a") == text("a").last_turn_trained()
    assert as_row(text("a")) == {"text": "a"}


def test_it_is_converted_to_rows_of_text(myna: Command) -> None:
    Path("docs").mkdir()
    Path("docs/a.txt").write_text("one\n")
    Path("docs/b.txt").write_text("two\n")
    assert myna("data", "convert", "docs", "-o", "rows.jsonl").returncode == 0
    assert [json.loads(line) for line in Path("rows.jsonl").read_text().splitlines()] == [
        {"text": "one\n"},
        {"text": "two\n"},
    ]


def test_the_whole_way(myna: Command, tiny_base: Path) -> None:
    rows = [{"text": f"{row['prompt']} {row['completion']} " * 8} for row in tiny.rows(20)]
    write(Path("docs.jsonl"), *rows)
    Path("recipe.yaml").write_text(
        tiny.recipe_text(
            tiny_base, Path("docs.jsonl").resolve(), train={"max_steps": 2}, data={"max_length": 64}
        )
    )
    done = myna("run", "recipe.yaml")
    assert done.returncode == 0, done.stderr
    assert "18 texts in" in done.stderr and "0 cut" in done.stderr
    assert "no answers to compare" in done.stderr
    from myna.run import Run

    run = Run(Path("runs/docs"))
    assert len(held_out(run)) == 2 and all(row.is_text for row in held_out(run))
    assert len(training_rows(run, 99)) == 18
    assert run.report_path.is_file() and not run.evaluation_path.is_file()
    assert myna("verify", "runs/docs").returncode == 0

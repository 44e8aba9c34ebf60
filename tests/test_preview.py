"""`myna data show`: which rows, every token with its text, and a page on which nothing of a row is markup."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import tiny
from conftest import Command
from test_report import HOSTILE, Reader
from tiny_tokenizers import write_family_tokenizer

from myna.data.conversation import Conversation, Message, Place
from myna.data.render import load_chat_tokenizer, render_example
from myna.preview import ShownRow, preview_rows, shown_row
from myna.preview_page import preview_page
from myna.recipe import build_recipe

PERSIAN = "می‌خواهم ۲ لامپ قرمز"
SPECIAL = {"ids": [1], "text": "<|im_start|>", "trained": False, "special": True}
TEXTS = {
    "persian": PERSIAN,
    "emoji": "family 👩‍👩‍👧‍👦 and 👋🏽",
    "code": "def f(x):\n\treturn x < 3 & x > 1\n\n\n# end",
    "han": "北京是中国的首都。",
    "half": "broken \ufffd here",
    "spaces": "  two   three ",
    "hidden": "a\u202eb\u202c c\u200bd\x07",
    "markup": HOSTILE.replace("\ud800", ""),
}


@pytest.fixture
def folder(tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    rows = tiny.write_rows(tmp_path / "orders.jsonl", tiny.rows(20))
    (tmp_path / "recipe.yaml").write_text(tiny.recipe_text(tiny_base, rows))
    return tmp_path


def shown_of(base: Path, answer: str, prompt: str = "q") -> ShownRow:
    tokenizer = load_chat_tokenizer(base)
    messages = (Message("user", prompt), Message("assistant", answer))
    row = Conversation(messages, Place("rows.jsonl", 1))
    return shown_row(render_example(row, tokenizer, 2048), tokenizer)


@pytest.mark.parametrize("name", TEXTS)
def test_the_tokens_are_the_row(tiny_base: Path, name: str) -> None:
    row = shown_of(tiny_base, TEXTS[name], prompt=TEXTS[name])
    assert [one for token in row.tokens for one in token.ids] == list(row.input_ids)
    assert "".join(token.text for token in row.tokens) == "".join(text for text, _ in row.pieces)
    trained = "".join(token.text for token in row.tokens if token.trained)
    assert trained == TEXTS[name] + "<|im_end|>"
    assert [token.text for token in row.tokens if token.special] == [
        *("<|im_start|>", "<|im_end|>", "<|im_start|>", "<|im_end|>")
    ]


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen2", "phi3"])
def test_the_tokens_of_a_family_are_the_row(tmp_path: Path, family: str) -> None:
    """SentencePiece's decoders drop a space in front and put bytes together: no token loses any of its text."""
    write_family_tokenizer(tmp_path, family)
    row = shown_of(tmp_path, "مرحبا بالعالم. naïve  café 👋 x")
    assert [one for token in row.tokens for one in token.ids] == list(row.input_ids)
    assert "".join(token.text for token in row.tokens) == "".join(text for text, _ in row.pieces)


def test_bytes_that_are_half_a_character_are_shown_together(tiny_base: Path) -> None:
    (token,) = [one for one in shown_of(tiny_base, "👋").tokens if one.text == "👋"]
    assert len(token.ids) == 4


def chosen(folder: Path, *names: str, num_rows: int = 3, **data: Any) -> list[str]:
    tree = json.loads((folder / "recipe.yaml").read_text())
    tree["data"] |= data
    rows = preview_rows(build_recipe(tree), num_rows, lambda _: None, names)
    return [Path(row.place).name for row in rows]


def test_a_row_by_its_number_and_by_its_place(folder: Path) -> None:
    path = folder / "orders.jsonl"
    assert chosen(folder, "17") == chosen(folder, "orders.jsonl:17") == ["orders.jsonl:17"]
    assert chosen(folder, f"{path}:3", "2") == ["orders.jsonl:3", "orders.jsonl:2"]
    path.write_text("\n\n" + path.read_text())  # the first row is on the third line
    assert chosen(folder, "1") == chosen(folder, "orders.jsonl:3") == ["orders.jsonl:3"]


def test_a_row_of_a_list_and_of_a_folder(folder: Path) -> None:
    rows = folder / "more"
    rows.mkdir()
    (rows / "a.json").write_text(json.dumps(tiny.rows(5)))
    tiny.write_rows(rows / "b.jsonl", tiny.rows(5, start=9))
    assert chosen(folder, "a.json: row 4", "b.jsonl:2", "7", train=str(rows)) == [
        *("a.json: row 4", "b.jsonl:2", "b.jsonl:2")
    ]


def test_a_row_of_any_file_of_the_recipe(folder: Path) -> None:
    tiny.write_rows(folder / "test.jsonl", tiny.rows(4, start=90))
    (folder / "chat.csv").write_text("question,says\nhello,hi\n", encoding="utf-8")
    tree = json.loads((folder / "recipe.yaml").read_text())
    mix = [{"train": str(folder / "chat.csv"), "columns": {"completion": "says"}, "system": "Be kind."}]
    tree["data"] |= {"test": str(folder / "test.jsonl"), "mix": mix, "system": "As JSON."}
    names = ("chat.csv:2", "test.jsonl:3", "orders.jsonl:3")
    rows = preview_rows(build_recipe(tree), 3, lambda _: None, names)
    assert [Path(row.place).name for row in rows] == list(names)
    assert ["Be kind." in row.pieces[0][0] for row in rows] == [True, False, False]
    assert ["As JSON." in row.pieces[0][0] for row in rows] == [False, True, True]


def test_the_conversations_of_one_row(folder: Path) -> None:
    questions = [{"id": f"q{n}", "question": f"what {n}?", "answers": [{"text": str(n)}]} for n in range(5)]
    article = {"title": "t", "paragraphs": [{"context": "c", "qas": questions}]}
    path = folder / "squad.json"
    path.write_text(json.dumps([article]))
    assert len(chosen(folder, "squad.json: row 1", num_rows=2, train=str(path))) == 2
    assert chosen(folder, "squad.json: row 1, question q3", train=str(path)) == [
        "squad.json: row 1, question q3"
    ]


def test_a_fault_elsewhere_hides_no_row_and_its_own_is_told(folder: Path, myna: Command) -> None:
    path = folder / "orders.jsonl"
    path.write_text("{\n" + path.read_text())
    assert chosen(folder, "orders.jsonl:2") == chosen(folder, "1") == ["orders.jsonl:2"]
    assert chosen(folder, "20") == ["orders.jsonl:21"]
    done = myna("data", "show", "recipe.yaml", "--row", "orders.jsonl:1")
    assert done.returncode == 3 and "broken JSON" in done.stderr
    missing = myna("data", "show", "recipe.yaml", "--row", "21")
    assert missing.returncode == 3 and "there is no row 21: there are 20" in missing.stderr
    nowhere = myna("data", "show", "recipe.yaml", "--row", "other.jsonl:2")
    assert nowhere.returncode == 3 and "no row at other.jsonl:2" in nowhere.stderr
    for wrong in ("0", "orders.jsonl", "-1"):
        assert myna("data", "show", "recipe.yaml", f"--row={wrong}").returncode == 2


def test_ids_stand_beside_their_text(folder: Path, tiny_base: Path, myna: Command) -> None:
    done = myna("data", "show", "recipe.yaml", "--row", "2", "--ids")
    tokens = preview_rows(build_recipe(json.loads((folder / "recipe.yaml").read_text())), 2, lambda _: None)[
        1
    ]
    lines = done.stdout.split("\n")[: len(tokens.tokens)]
    assert [int(line.split()[0]) for line in lines] == list(tokens.input_ids)
    assert lines[0] == "       1   <|im_start|>" and lines[-1] == "       2  «<|im_end|>»"
    assert any(line.endswith("   \\n") for line in lines)
    told = json.loads(myna("data", "show", "recipe.yaml", "--row", "2", "--ids", "--json").stdout)
    assert told["rows"][0]["tokens"][0] == SPECIAL


def page_of(*rows: ShownRow) -> tuple[str, Reader]:
    page = preview_page("rows.jsonl", rows, "base")
    return page, Reader(page)


def test_the_page_is_the_rows_and_nothing_of_them_is_markup(tiny_base: Path) -> None:
    rows = [shown_of(tiny_base, answer, prompt=answer) for answer in TEXTS.values()]
    page, reader = page_of(*rows)
    assert not reader.names() & {"script", "img", "iframe", "object", "form", "a"}
    assert not any(name.startswith("on") for _, attributes in reader.tags for name in attributes)
    assert "default-src 'none'" in page and "http" not in page.replace("http-equiv", "").replace(
        "http://x.example", ""
    )
    for text in TEXTS.values():
        for line in text.split("\n"):
            plain = "".join(c if c not in "\u202e\u202c\u200b\x07" else f"U+{ord(c):04X}" for c in line)
            assert plain in reader.words


def test_a_line_has_its_own_direction_and_a_special_token_none(tiny_base: Path) -> None:
    page, reader = page_of(shown_of(tiny_base, f"{PERSIAN}\nplain", prompt="q\n\nr"))
    lines = [attributes for tag, attributes in reader.tags if tag == "div" and "dir" in attributes]
    assert len(lines) == 7 and {one["dir"] for one in lines} == {"auto"}
    marks = [attributes for tag, attributes in reader.tags if tag == "bdi" and "title" in attributes]
    assert len(marks) == 4 and marks[-1]["class"] == "t on special"
    assert page.count('<i class="break"></i>') == 6


def test_every_token_tells_its_id(tiny_base: Path) -> None:
    row = shown_of(tiny_base, PERSIAN)
    _, reader = page_of(row)
    titles = [attributes["title"] for _, attributes in reader.tags if "title" in attributes]
    assert len(titles) == len(row.tokens)
    assert [int(one) for title in titles for one in (title or "").split(" · ")[0].split(" + ")] == list(
        row.input_ids
    )
    assert any("zero width non-joiner" in (title or "") for title in titles)


def test_a_page_is_written_once(folder: Path, myna: Command) -> None:
    done = myna("data", "show", "recipe.yaml", "--html", "rows.html", "--rows", "2")
    assert done.returncode == 0 and "2 rows written to rows.html" in done.stdout
    written = (folder / "rows.html").read_text(encoding="utf-8")
    assert written.count('class="row"') == 2 and tiny.rows(1)[0]["prompt"] in Reader(written).words
    again = myna("data", "show", "recipe.yaml", "--html", "rows.html")
    assert again.returncode == 2 and "--yes" in again.stderr
    told = json.loads(myna("data", "show", "recipe.yaml", "--html", "rows.html", "--yes", "--json").stdout)
    assert told["html"] == "rows.html" and len(told["rows"]) == 3


def test_a_terminal_obeys_nothing_that_a_row_says(tiny_base: Path) -> None:
    said = shown_of(tiny_base, "a\tb\n\x1b]0;title\x07\x9b31m\r").as_text().plain
    assert "«a\tb\n\\x1b]0;title\\x07\\x9b31m\\r<|im_end|>»" in said


def test_rows_are_cut_and_parted_as_training_does(folder: Path) -> None:
    tree = json.loads((folder / "recipe.yaml").read_text())
    (folder / "orders.jsonl").write_text(json.dumps({"prompt": "q", "completion": "word " * 1000}) + "\n")
    (row,) = preview_rows(build_recipe(tree), 1, lambda _: None)
    assert row.num_tokens == 256 and row.num_cut, "the base reads no more at once"
    (folder / "orders.jsonl").write_text(json.dumps({"text": "word " * 1000}) + "\n")
    rows = preview_rows(build_recipe(tree), 1, lambda _: None)
    assert len(rows) > 3 and not any(one.num_cut for one in rows)
    assert all(a.input_ids[-1] == b.input_ids[0] for a, b in itertools.pairwise(rows))

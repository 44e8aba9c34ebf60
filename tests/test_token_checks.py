"""`myna data check RECIPE`: tokens counted as training counts them, and what only a tokenizer tells."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
from conftest import Command
from test_report import HOSTILE, Reader

from myna.data.render import load_chat_tokenizer, render_example
from myna.data.review import Review, review_rows
from myna.data.rows import read_conversations
from myna.data.token_checks import TokenSettings
from myna.review_page import review_page
from myna.settings import DataSettings


def settings(base: Path, max_length: int = 64, **data: Any) -> TokenSettings:
    return TokenSettings("tiny", base, max_length, DataSettings(train="a", **data))


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pair(prompt: str, completion: str) -> dict[str, Any]:
    return {"prompt": prompt, "completion": completion}


def errors_and_warnings(review: Review) -> dict[tuple[str, str], int]:
    return {(f.level, f.code): f.count for f in review.findings}


def test_the_counts_are_those_of_the_rows(tmp_path: Path, tiny_base: Path) -> None:
    rows = [pair("word " * n, "answer " * (n % 5 + 1)) for n in range(1, 30)]
    path = write(tmp_path / "a.jsonl", *rows)
    counts = review_rows(path, near=False, tokens=settings(tiny_base, 4096)).tokens
    tokenizer = load_chat_tokenizer(tiny_base)
    examples = [render_example(c, tokenizer, 4096) for c in read_conversations(path).conversations]
    lengths = sorted(len(example.input_ids_T) for example in examples)
    assert counts is not None
    assert (counts.total, counts.longest, counts.middle) == (
        sum(lengths),
        lengths[-1],
        lengths[len(lengths) // 2],
    )
    assert counts.learnt == sum(example.num_targets for example in examples)
    assert counts.longest_place == f"{path}:29" and (counts.num_cut, counts.num_masked) == (0, 0)
    below = 0
    for upper, count in counts.histogram:
        assert count == sum(below < length <= upper for length in lengths)
        below = upper
    assert sum(count for _, count in counts.histogram) == len(rows)


def test_the_system_text_and_the_turns_that_are_learnt_count(tmp_path: Path, tiny_base: Path) -> None:
    turns = [
        {"role": r, "content": c}
        for r, c in (("user", "q"), ("assistant", "aa"), ("user", "q"), ("assistant", "a"))
    ]
    path = write(tmp_path / "a.jsonl", {"messages": turns})
    plain, system, last = (
        review_rows(path, tokens=settings(tiny_base, 256, **data)).tokens
        for data in ({}, {"system": "Be brief and kind."}, {"train_on": "last"})
    )
    assert plain and system and last
    assert system.total > plain.total == last.total and last.learnt < plain.learnt


def test_rows_that_are_cut_and_rows_that_teach_nothing(tmp_path: Path, tiny_base: Path) -> None:
    few = [pair("q", "a")] * 300
    long = [pair("q", "word " * 100), pair("word " * 100, "a")]
    path = write(tmp_path / "a.jsonl", *few, *long)
    review = review_rows(path, near=False, tokens=settings(tiny_base))
    told = errors_and_warnings(review)
    assert (told["warning", "D040"], told["warning", "D041"]) == (2, 1) and ("error", "D040") not in told
    masked = next(f for f in review.findings if f.code == "D041")
    assert masked.places[0][0] == f"{path}:302"
    path = write(tmp_path / "b.jsonl", *few[:20], *long)
    assert (
        errors_and_warnings(review_rows(path, near=False, tokens=settings(tiny_base)))["error", "D040"] == 1
    )
    allowed = review_rows(path, near=False, tokens=settings(tiny_base, cut_long=True))
    assert ("error", "D040") not in errors_and_warnings(allowed)


def test_a_row_that_the_template_refuses_is_named_and_the_others_counted(
    tmp_path: Path, tiny_base: Path
) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "tokenizer.json").write_bytes((tiny_base / "tokenizer.json").read_bytes())
    (base / "tokenizer_config.json").write_bytes((tiny_base / "tokenizer_config.json").read_bytes())
    template = load_chat_tokenizer(tiny_base).template_text
    refusing = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role here') }}{% endif %}"
    )
    (base / "chat_template.jinja").write_text(refusing + template)
    with_system = {"messages": [{"role": "system", "content": "s"}, *pair_of_turns()]}
    path = write(
        tmp_path / "a.jsonl", {"messages": pair_of_turns()}, with_system, {"messages": pair_of_turns("r")}
    )
    review = review_rows(path, tokens=settings(base))
    (finding,) = (f for f in review.findings if f.code == "D042")
    assert finding.level == "error" and finding.places[0][0] == f"{path}:2"
    assert "no system role here" in finding.places[0][1]
    assert review.tokens and sum(count for _, count in review.tokens.histogram) == 2
    assert review.num_unskippable == 1, "training refuses it whatever becomes of bad rows"


def pair_of_turns(question: str = "q") -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": "a"}]


@pytest.fixture
def folder(tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    rows = tiny.write_rows(tmp_path / "orders.jsonl", tiny.rows(20))
    (tmp_path / "recipe.yaml").write_text(tiny.recipe_text(tiny_base, rows))
    return tmp_path


def test_the_command_counts_with_a_recipe_and_says_why_not_without(folder: Path, myna: Command) -> None:
    told = json.loads(myna("data", "check", "recipe.yaml", "--json", "--html", "page.html").stdout)
    assert told["tokens"]["total"] > 0 and told["not_checked"] == []
    assert "Tokens a row" in (folder / "page.html").read_text()
    without = json.loads(myna("data", "check", "orders.jsonl", "--json").stdout)
    assert without["tokens"] is None and "give a recipe" in without["not_checked"][0]
    none = json.loads(myna("data", "check", "recipe.yaml", "--no-tokens", "--json").stdout)
    assert none["tokens"] is None and none["not_checked"] == []
    gone = json.loads(
        myna("data", "check", "recipe.yaml", "--json", "--set", "model.base=hf:no/where@main").stdout
    )
    assert gone["tokens"] is None and "not on this disk" in gone["not_checked"][0]


def test_counting_loads_no_torch(folder: Path) -> None:
    code = (
        "import sys; from myna.cli import exit_code; assert exit_code(['data', 'check', 'recipe.yaml']) == 0; "
        "print([n for n in ('torch', 'transformers', 'pyarrow', 'openpyxl') if n in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=folder
    )
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr
    assert "histogram" in done.stdout


def test_nothing_on_the_page_is_markup(tmp_path: Path, tiny_base: Path) -> None:
    hostile = HOSTILE.replace("\ud800", "")
    path = write(
        tmp_path / "a.jsonl", pair("q", "a"), {hostile: 1, "prompt": "q", "completion": "b"}, pair("", "x")
    )
    reviews = {"train": review_rows(path, tokens=settings(tiny_base)), "mix.1": review_rows(path)}
    for some in (reviews, {"train": reviews["train"]}):
        reader = Reader(review_page(some))
        assert not reader.names() & {"script", "img", "svg", "b"}
        for word in ("D013", "D031", "Tokens a row"):
            assert word in reader.words

"""`myna data check` and `data convert`: everything at once, in words and as JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import Command

from myna.data.review import review_rows
from myna.data.warned import PRIVATE, is_card, is_iban, private_in


def write(path: Path, *rows: Any) -> Path:
    lines = (row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def pair(prompt: str, completion: str = "a", **more: str) -> dict[str, str]:
    return {"prompt": prompt, "completion": completion, **more}


def found(path: Path, **settings: Any) -> dict[str, int]:
    return {finding.code: finding.count for finding in review_rows(path, **settings).findings}


def test_all_faults_and_warnings_are_counted_by_code(tmp_path: Path) -> None:
    rows = [pair(f"q{n}") for n in range(5)]
    path = write(
        tmp_path / "a.jsonl",
        *rows,
        "broken",
        pair(""),
        pair(""),
        pair(" "),
        pair("x", ""),
        pair("q0", id="7"),
    )
    review = review_rows(path)
    assert {(f.code, f.level, f.count) for f in review.findings} == {
        ("D001", "error", 1),
        ("D013", "error", 4),
        ("D030", "warning", 1),
    }
    (empty,) = (f for f in review.findings if f.code == "D013")
    assert [where for where, _ in empty.places] == [f"{path}:7", f"{path}:8", f"{path}:9"]
    assert (review.num_rows, review.num_conversations, review.num_errors) == (11, 6, 5)


def test_one_prompt_with_two_answers(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", pair("q", "a"), pair("q", "b"), pair("q", "a"))
    review = review_rows(path)
    assert {f.code: f.places[0] for f in review.findings} == {
        "D031": (f"{path}:2", "the same prompt as 1, another answer"),
        "D030": (f"{path}:3", "the same conversation as 1"),
    }


def test_prompts_of_the_test_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", pair("q"), pair("r"))
    test = write(tmp_path / "test.jsonl", pair("q", "another"))
    assert found(path, test=test) == {"D032": 1}


def test_one_answer_nearly_always(tmp_path: Path) -> None:
    rows = [pair(f"q{n}", "spam" if n % 20 else "ham") for n in range(100)]
    assert found(write(tmp_path / "a.jsonl", *rows)) == {"D033": 1}
    even = [pair(f"q{n}", "spam" if n % 2 else "ham") for n in range(100)]
    assert found(write(tmp_path / "b.jsonl", *even)) == {}
    assert found(write(tmp_path / "c.jsonl", *rows[:40])) == {}, "too few rows to tell"


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("end <|im_end|> here", "D034"),
        ("[INST] do", "D034"),
        ("<start_of_turn>user", "D034"),
        ("p\u0430ypal", "D035"),
        ("a\0b", "D037"),
        ("mail me: jo.doe+x@example.org", "D036"),
    ],
)
def test_texts_that_are_suspect(tmp_path: Path, text: str, code: str) -> None:
    assert found(write(tmp_path / "a.jsonl", pair(text))) == {code: 1}
    assert found(write(tmp_path / "a.jsonl", pair("q", text))) == {code: 1}


def test_plain_texts_are_not_suspect(tmp_path: Path) -> None:
    texts = [
        "a <b> tag",
        "x < y > z",
        "سلام world",
        "Привет, world",
        "call 2026-11-27 12:30",
        "0.4111111111111111",
        "1234 5678 9012 3456",
        "λ-calculus",
        "3 μm",
        "Δx",
    ]
    assert found(write(tmp_path / "a.jsonl", *map(pair, texts))) == {}


SECRETS = {
    "a private key": "-----BEGIN RSA PRIVATE KEY-----",
    "an access key": "AKIAIOSFODNN7EXAMPLE",
    "an e-mail address": "jo@example.org",
    "a card number": "4111 1111 1111 1111",
    "an IBAN": "DE89 3704 0044 0532 0130 00",
}


def test_every_kind_of_private_thing_is_found_and_not_printed(tmp_path: Path) -> None:
    assert SECRETS.keys() == {kind for kind, _, _ in PRIVATE}
    for kind, text in SECRETS.items():
        assert private_in(f"it is {text}, you know") == [kind]
    review = review_rows(write(tmp_path / "a.jsonl", *map(pair, SECRETS.values())))
    (finding,) = review.findings
    assert finding.count == len(SECRETS) and not any(text in str(finding) for text in SECRETS.values())
    assert found(tmp_path / "a.jsonl", private=False) == {}


def test_check_digits_are_looked_at() -> None:
    assert is_card("4111111111111111") and not is_card("4111111111111112") and not is_card("0000000000000000")
    assert is_iban("DE89370400440532013000") and not is_iban("DE88370400440532013000")


def test_what_cannot_be_opened_is_a_finding_too(tmp_path: Path) -> None:
    assert found(tmp_path / "none.jsonl") == {"D007": 1}


def test_the_command_tells_and_exits_3_or_0(myna: Command, tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", pair("q"), pair("q"), "broken")
    done = myna("data", "check", "a.jsonl")
    assert done.returncode == 3
    for part in ("error[D001]", "warning[D030]", "a.jsonl:3", "help: ", "not checked", "prompt/answer"):
        assert part in done.stdout
    write(tmp_path / "a.jsonl", pair("q"), pair("q"))
    done = myna("data", "check", "a.jsonl", "--json")
    told = json.loads(done.stdout)
    assert done.returncode == 0 and told["num_errors"] == 0
    assert [finding["code"] for finding in told["findings"]] == ["D030"]


def test_the_command_takes_a_recipe(myna: Command, tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", {"frage": "q", "antwort": "a"})
    write(tmp_path / "test.jsonl", {"frage": "q", "antwort": "b"})
    (tmp_path / "recipe.yaml").write_text(
        "data: {train: rows.jsonl, test: test.jsonl, columns: {prompt: frage, completion: antwort}}\n"
    )
    done = myna("data", "check", "recipe.yaml", "--json")
    assert done.returncode == 0
    assert [finding["code"] for finding in json.loads(done.stdout)["findings"]] == ["D032"]
    assert myna("data", "check", "rows.jsonl", "--set", "data.columns.prompt=nix").returncode == 3


def test_rows_of_any_shape_are_written_as_messages(myna: Command, tmp_path: Path) -> None:
    squad = {"paragraphs": [{"context": "c", "qas": [{"question": "q", "answers": [{"text": "a"}]}] * 2}]}
    write(tmp_path / "a.jsonl", squad)
    done = myna("data", "convert", "a.jsonl", "--out", "b.jsonl")
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "b.jsonl").read_text().splitlines()]
    turns = [{"role": "user", "content": "c\n\nq"}, {"role": "assistant", "content": "a"}]
    assert lines == [{"messages": turns}] * 2
    assert myna("data", "convert", "a.jsonl", "-o", "b.jsonl").returncode == 2
    assert myna("data", "convert", "a.jsonl", "-o", "b.jsonl", "--yes").returncode == 0
    write(tmp_path / "a.jsonl", pair(""))
    assert myna("data", "convert", "a.jsonl", "-o", "c.jsonl").returncode == 3
    assert not (tmp_path / "c.jsonl").exists()


def test_the_check_loads_nothing_heavy(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", pair("q"))
    code = (
        "import sys; from myna.cli import exit_code; assert exit_code(['data', 'check', sys.argv[1]]) == 0; "
        "print([n for n in ('torch', 'transformers', 'pyarrow', 'openpyxl') if n in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "a.jsonl")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_convert_writes_json_lines_and_one_file_of_rows(myna: Command, tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", pair("q"))
    done = myna("data", "convert", "a.jsonl", "-o", "b.csv")
    assert done.returncode == 2 and "-o b.jsonl" in done.stderr
    (tmp_path / "r.yaml").write_text("data: {train: a.jsonl, mix: [{train: a.jsonl}]}\n")
    assert "data.mix" in myna("data", "convert", "r.yaml", "-o", "b.jsonl").stderr


def test_init_reads_rows_as_it_is_told_and_writes_that_down(myna: Command, tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", {"id": "1", "ticket": "q", "reply": "a"})
    given = ["--set", "data.columns.prompt=ticket", "--set", "data.columns.completion=reply"]
    assert myna("init", "a.jsonl").returncode == 3
    assert myna("init", "a.jsonl", *given, "--set", "data.system=Be brief").returncode == 0
    assert myna("data", "check", "recipe.yaml", "--no-tokens").returncode == 0
    written = (tmp_path / "recipe.yaml").read_text()
    assert (
        'columns: {"prompt": "ticket", "completion": "reply"}' in written and 'system: "Be brief"' in written
    )


def test_a_folder_that_goes_away_while_it_is_walked_is_no_crash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    write(tmp_path / "a.jsonl", pair("q"))
    (tmp_path / "gone").mkdir()
    scandir = os.scandir

    def vanishing(path: Any) -> Any:
        if Path(path).name == "gone":
            raise FileNotFoundError(path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", vanishing)
    assert review_rows(tmp_path).num_rows == 1

"""What a user mistypes: one or two lines with the cure, the right exit code, and nothing half-written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
from conftest import Command


@pytest.fixture
def folder(tmp_path: Path, tiny_base: Path) -> Path:
    tiny.write_rows(tmp_path / "orders.jsonl", tiny.rows(20))
    (tmp_path / "recipe.yaml").write_text(tiny.recipe_text(tiny_base, Path("orders.jsonl")))
    return tmp_path


def one_error(myna: Command, *arguments: str) -> tuple[int, dict[str, str]]:
    """(exit code, the error object); the same failure without --json is at most a few plain lines."""
    done = myna(*arguments, "--json")
    error = json.loads(done.stdout)["error"]
    assert set(error) == {"code", "message", "where", "help"}
    plain = myna(*arguments)
    assert plain.returncode == done.returncode and plain.stdout == ""
    assert "Traceback" not in plain.stderr
    return done.returncode, error


MISTAKES = {
    "setting": (["train", "recipe.yaml", "--set", "train.epoch=3"], 2, "Did you mean train.epochs?"),
    "recipe": (["run", "recipes.yaml"], 2, "no such recipe"),
    "type": (["train", "recipe.yaml", "--set", "export.quantize=[Q4_K_L]"], 2, "Q4_K_L"),
    "rows": (["train", "recipe.yaml", "--set", "data.train=nope.jsonl"], 3, "nope.jsonl"),
    "base": (["train", "recipe.yaml", "--set", "model.base=gpt-5"], 3, "no base model"),
    "gguf": (["train", "recipe.yaml", "--set", "model.base=./no.gguf"], 3, "no such file"),
    "run": (["evaluate", "nope"], 2, "is no run"),
    "talk": (["chat", "nope", "--once", "x"], 2, "no .gguf file and no base model"),
    "prompt file": (["chat", "x.gguf", "--prompt-file", "nope.txt"], 3, "no such prompt file"),
    "tokens": (["chat", "x.gguf", "--once", "x", "--max-tokens", "0"], 2, "--max-tokens 0"),
    "option": (["train", "recipe.yaml", "--epochs", "3"], 2, "No such option"),
    "argument": (["train"], 2, "Missing argument"),
    "folder base": (["train", "recipe.yaml", "--set", "model.base=."], 3, "config.json"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_told_with_its_exit_code(name: str, folder: Path, myna: Command) -> None:
    arguments, code, words = MISTAKES[name]
    before = sorted(path.name for path in folder.iterdir())
    found, error = one_error(myna, *arguments)
    told = f"{error['where']}: {error['message']} {error['help']}"
    assert words in told, told
    assert found == code
    assert sorted(path.name for path in folder.iterdir() if list(path.rglob("*")) or path.is_file()) == before


def test_broken_rows_name_file_and_line(folder: Path, myna: Command) -> None:
    rows = folder / "orders.jsonl"
    rows.write_text(rows.read_text() + '{"prompt": "x", "completion": }\n{"prompt": "only"}\n')
    code, error = one_error(myna, "train", "recipe.yaml")
    assert code == 3
    assert "orders.jsonl:21" in str(error) and "orders.jsonl:22" in str(error)


def test_a_pickled_base_is_refused(folder: Path, myna: Command) -> None:
    (folder / "old").mkdir()
    (folder / "old/config.json").write_text('{"model_type": "llama"}')
    (folder / "old/pytorch_model.bin").write_bytes(b"x")
    code, error = one_error(myna, "train", "recipe.yaml", "--set", "model.base=./old")
    assert code == 3 and "pickled" in error["message"] and "safetensors" in error["help"]


def test_init_writes_a_recipe_that_loads_and_replaces_none(
    folder: Path, myna: Command, tmp_path: Path
) -> None:
    from myna.recipe import load_recipe

    (folder / "recipe.yaml").unlink()
    done = myna("init", "orders.jsonl")
    assert done.returncode == 0 and "20 rows, prompt/answer" in done.stdout
    recipe = load_recipe(folder / "recipe.yaml")
    assert recipe.data.train == str(folder / "orders.jsonl")
    text = (folder / "recipe.yaml").read_text()
    assert "# learning_rate:" in text and "# epochs: 1" in text
    assert load_recipe(folder / "recipe.yaml", ["train.epochs=2"]).train.epochs == 2
    refused = myna("init", "orders.jsonl")
    assert refused.returncode == 2 and "--yes" in refused.stderr
    assert myna("init", "orders.jsonl", "--yes", "--json").returncode == 0


def test_data_show_shows_what_is_trained(folder: Path, myna: Command) -> None:
    done = myna("data", "show", "recipe.yaml", "--rows", "2", "--json")
    assert done.returncode == 0, done.stderr
    first, _ = json.loads(done.stdout)["rows"]
    trained = "".join(piece["text"] for piece in first["pieces"] if piece["trained"])
    assert trained == tiny.rows(1)[0]["completion"] + "<|im_end|>"
    plain = myna("data", "show", "recipe.yaml", "--rows", "1")
    assert f"«{trained}»" in plain.stdout


def test_version_help_and_doctor(myna: Command) -> None:
    assert myna("--version").stdout.startswith("myna ")
    assert "demo" in myna("--help").stdout
    report = myna("doctor", "--json")
    assert report.returncode == 0, report.stdout
    assert json.loads(report.stdout)
    assert "torch" in myna("doctor").stdout


def test_without_stdin_or_terminal_a_chat_reads_lines(folder: Path, tiny_base: Path, myna: Command) -> None:
    done = myna("chat", str(tiny_base), "--max-tokens", "3", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[0])["model"]


def test_a_prompt_file_is_continued_without_a_template(folder: Path, tiny_base: Path, myna: Command) -> None:
    (folder / "bob.txt").write_text("User: I want the red lamp\nBob:")
    arguments = ["chat", str(tiny_base), "--prompt-file", "bob.txt", "--raw", "--stop", "User:", "--json"]
    raw = json.loads(myna(*arguments, "--max-tokens", "20", "--temperature", "0").stdout)
    turn = json.loads(
        myna(*(a for a in arguments if a != "--raw"), "--max-tokens", "20", "--temperature", "0").stdout
    )
    assert raw["text"] != turn["text"] and "User:" not in raw["text"]


def test_ctrl_c_in_a_stage_says_how_to_go_on(
    folder: Path, myna: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not only in training, which saves first: any other stage is left at once, with a word and 130."""
    from myna import preview

    def pressed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(preview, "load_rows", pressed)
    code, error = one_error(myna, "data", "show", "recipe.yaml")
    assert code == 130
    assert error["code"] == "interrupted" and error["help"] == "the same command again goes on"


@pytest.mark.parametrize(
    ("arguments", "command"),
    [
        (["data", "show", "recipe.yaml", "--rows"], "myna data show"),
        (["data", "check", "orders.jsonl", "--set"], "myna data check"),
        (["export", "x", "--quantize"], "myna export"),
        (["data", "shw"], "myna data"),
        (["--nothing"], "myna"),
    ],
)
def test_a_wrong_option_points_to_the_help_of_its_command(
    arguments: list[str], command: str, folder: Path, myna: Command
) -> None:
    done = myna(*arguments)  # what stands last lacks its value
    assert done.returncode == 2 and done.stderr.endswith(f"help: {command} --help\n")


def test_a_page_that_is_written_is_told(folder: Path, myna: Command) -> None:
    done = myna("data", "check", "orders.jsonl", "--html", "found.html")
    assert "found.html" in done.stdout.splitlines()[-1] and (folder / "found.html").is_file()
    told = json.loads(myna("data", "check", "orders.jsonl", "--html", "again.html", "--json").stdout)
    assert told["html"] == "again.html"


def test_rows_that_were_set_aside_are_not_written_over(folder: Path, myna: Command) -> None:
    """The rows of a quarantine may be nowhere else: another file's of the same name get a number."""
    rows = folder / "orders.jsonl"
    whole = rows.read_text()
    rows.write_text(whole + '{"prompt": "only"}\n')
    once = folder / "orders.quarantine.jsonl"
    for _ in range(2):  # the same rows are the same file
        assert (
            "orders.quarantine.jsonl"
            in myna("data", "check", "orders.jsonl", "--on-bad-row", "quarantine").stdout
        )
        assert [path.name for path in folder.glob("*quarantine*")] == [once.name]
    kept = once.read_bytes()
    rows.write_text(whole + '{"prompt": "another"}\n')
    done = myna("data", "convert", "orders.jsonl", "-o", "orders.ndjson", "--on-bad-row", "quarantine")
    assert "orders-2.quarantine.jsonl" in done.stdout
    assert once.read_bytes() == kept and "another" in (folder / "orders-2.quarantine.jsonl").read_text()

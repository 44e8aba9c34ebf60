"""What is refused of what Myna did not train, and that nothing of the user's goes with it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny
from conftest import Command
from tiny_adapters import lora, write_adapter

from myna.run import read_json


@pytest.fixture(scope="module")
def adapter(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(tmp_path_factory.mktemp("adapters") / "theirs", tiny_base, lora())


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MYNA_CACHE", str(tmp_path / "cache"))


def test_a_whole_model_has_nothing_to_go_direct_from(myna: Command, tmp_path: Path, tiny_base: Path) -> None:
    done = myna("export", str(tiny_base), "--direct", "--name", "whole")
    assert done.returncode == 2 and "there is no adapter: leave --direct out" in done.stderr
    assert not (tmp_path / "runs/whole").exists()


def test_rows_that_do_not_fit_are_a_fault_of_the_rows(myna: Command, tmp_path: Path, tiny_base: Path) -> None:
    long = [{"prompt": "number " * 900, "completion": "1"}]
    tiny.write_rows(tmp_path / "long.jsonl", long)
    done = myna("evaluate", str(tiny_base), "--rows", "long.jsonl", "--json")
    error = json.loads(done.stdout)["error"]
    assert done.returncode == 3 and error["code"] == "cut" and "shorter rows" in error["help"]
    assert "256 tokens" in error["message"] and error["where"].endswith("long.jsonl")


def test_a_name_that_is_taken_by_a_file_is_told_in_the_words_of_the_command(
    myna: Command, tmp_path: Path, adapter: Path
) -> None:
    (tmp_path / "afile").write_text("mine")
    for name in ("./afile", "./afile/below"):
        done = myna("merge", str(adapter), "--name", name)
        assert done.returncode == 2 and "--name NAME" in done.stderr and "--set" not in done.stderr
    assert (tmp_path / "afile").read_text() == "mine"


def test_an_empty_folder_of_the_users_stays(myna: Command, tmp_path: Path, tiny_base: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    done = myna("export", str(tiny_base), "--direct", "--name", "./mine")
    assert done.returncode == 2
    assert mine.is_dir() and list(mine.iterdir()) == []


def test_other_rows_take_the_scores_of_the_rows_before_with_them(
    myna: Command, tmp_path: Path, tiny_base: Path
) -> None:
    tiny.write_rows(tmp_path / "rows.jsonl", tiny.rows(2))
    tiny.write_rows(tmp_path / "others.jsonl", tiny.rows(3, start=7))
    assert myna("evaluate", str(tiny_base), "--name", "m", "--rows", "rows.jsonl").returncode == 0
    run = tmp_path / "runs/m"
    same = myna("export", "m", "--rows", "rows.jsonl", "--quantize", "Q8_0")
    assert same.returncode == 0, same.stderr
    assert (run / "evaluation.json").is_file() and "are removed" not in same.stderr
    other = myna("export", "m", "--rows", "others.jsonl", "--quantize", "Q8_0")
    assert other.returncode == 0 and "scores of the rows before are removed" in other.stderr
    assert not (run / "evaluation.json").exists() and not (run / "report.html").exists()
    info = read_json(run / "run.json")
    assert "evaluate" not in info["stages"] and "evaluation.json" not in info["digests"]
    verified = myna("verify", "m")
    assert verified.returncode == 0, verified.stdout


def test_a_folder_here_is_meant_before_a_run_of_its_name(
    myna: Command, tmp_path: Path, adapter: Path, tiny_base: Path
) -> None:
    """In chat as in merge, export and evaluate."""
    assert myna("merge", str(adapter), "--name", "both").returncode == 0
    shutil.copytree(tiny_base, tmp_path / "both")
    shutil.rmtree(tmp_path / "runs/both/tokenizer")  # the run would not answer
    done = myna("chat", "both", "--once", "Hello", "--json")
    assert done.returncode == 0, done.stderr
    # a run by its path is that run
    refused = myna("chat", "runs/both", "--once", "Hello")
    assert refused.returncode != 0

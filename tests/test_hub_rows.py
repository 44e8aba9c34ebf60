"""hf:org/name/config:split@revision as rows, through the real huggingface_hub, against a hub on this machine."""

from __future__ import annotations

import io
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from conftest import Command
from hub_server import Hub, running_hub

from myna.data.rows import load_conversations
from myna.errors import DataError, MachineError, MynaError, UsageError
from myna.model.hub_rows import Located, locate_rows, rows_on_disk
from myna.model.hub_splits import (
    HubSpec,
    configs_by_name,
    fits,
    is_read,
    parse_rows,
    split_of,
    told_configs,
    told_splits,
)


def lines(*prompts: str) -> bytes:
    return "".join(json.dumps({"prompt": p, "completion": "a"}) + "\n" for p in prompts).encode()


def parquet(*prompts: str) -> bytes:
    import pyarrow
    import pyarrow.parquet

    sink = io.BytesIO()
    table = pyarrow.Table.from_pylist([{"prompt": p, "completion": "a"} for p in prompts])
    pyarrow.parquet.write_table(table, sink)
    return sink.getvalue()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """huggingface_hub reads its settings when it is imported; here they are set where it keeps them."""
    from huggingface_hub import close_session, constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.3)
    monkeypatch.setenv("MYNA_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    with running_hub() as running:
        point_to(running.url, monkeypatch)
        yield running
    close_session()


def point_to(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


def prompts(found: Located) -> list[str]:
    return [c.messages[0].content for c in load_conversations(found.path).conversations]


def refusal(spec: str, kind: type[MynaError] = DataError) -> MynaError:
    with pytest.raises(kind) as caught:
        locate_rows(spec)
    assert "\n" not in caught.value.message and caught.value.help and caught.value.where == spec
    return caught.value


@pytest.mark.parametrize(
    ("spec", "found"),
    [
        ("hf:org/name", HubSpec("org/name", None, "train", None)),
        ("hf:org/name:dev", HubSpec("org/name", None, "validation", None)),
        ("hf:org/na.me/main:test@v1", HubSpec("org/na.me", "main", "test", "v1")),
        ("hf:org/name@refs/pr/1", HubSpec("org/name", None, "train", "refs/pr/1")),
        ("hf:squad:train", HubSpec("squad", None, "train", None)),
    ],
)
def test_what_a_name_says(spec: str, found: HubSpec) -> None:
    assert parse_rows(spec) == found


@pytest.mark.parametrize("spec", ["hf:", "hf:a/b/c/d", "hf:org/name:", "hf:org/name:a:b", "hf:../x y"])
def test_what_is_no_name(spec: str) -> None:
    assert refusal(spec).code == "D007"


@pytest.mark.parametrize(
    ("names", "configs"),
    [
        (["a.jsonl", "b.jsonl"], {"default": {"train": ["a.jsonl", "b.jsonl"]}}),
        (["train.jsonl", "my_dev.jsonl"], {"default": {"train": ["train.jsonl"], "validation": ["my_dev.jsonl"]}}),
        (["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "data/sft-00000-of-00001.parquet"],
         {"default": {"sft": ["data/sft-00000-of-00001.parquet"],
                      "train": ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"]}}),
        (["train/a.csv", "test/a.csv"], {"default": {"train": ["train/a.csv"], "test": ["test/a.csv"]}}),
        (["main/train-00000-of-00001.parquet", "socratic/test.parquet"],
         {"main": {"train": ["main/train-00000-of-00001.parquet"]}, "socratic": {"test": ["socratic/test.parquet"]}}),
        (["train.csv", "train.parquet", "train2.parquet"], {"default": {"train": ["train.parquet", "train2.parquet"]}}),
        (["trainer.jsonl"], {"default": {"train": ["trainer.jsonl"]}}),
    ],
)  # fmt: skip
def test_splits_are_told_by_names(names: list[str], configs: dict[str, Any]) -> None:
    assert configs_by_name(names) == configs


def test_patterns_and_shapes_of_data_files() -> None:
    assert fits("data/a/b.csv", "data/**") and fits("data/b.csv", "data/**/*.csv")
    assert not fits("data/a/b.csv", "data/*.csv") and not fits("xdata/b.csv", "data/*")
    names = ["a/x.csv", "b/y.csv"]
    assert told_splits("*/*.csv", "", names) == {"train": names}
    assert told_splits({"train": "x.csv"}, "a/", names) == {"train": ["a/x.csv"]}
    assert told_splits([{"split": "dev", "path": ["b/*"]}], "", names) == {"validation": ["b/y.csv"]}


def test_a_file_that_two_patterns_fit_is_taken_once() -> None:
    page = "---\nconfigs:\n- data_files:\n  - {split: train, path: a*}\n  - {split: train, path: '*'}\n---\n"
    configs = told_configs(page, ["ab.csv", "b.csv"])
    assert split_of("hf:o/n", parse_rows("hf:o/n"), configs) == ["ab.csv", "b.csv"]


@pytest.mark.parametrize("head", ["date: 2024-13-45", "a: " + "[" * 5000, "a: !!int x", "- b\n a: c"])
def test_a_page_whose_head_is_broken_tells_nothing(head: str) -> None:
    assert told_configs(f"---\n{head}\n---\n", ["ab.csv"]) == {}


@pytest.mark.parametrize("name", ["../a.csv", "/etc/a.csv", "a//b.csv", ".git/a.csv"])
def test_names_that_lead_elsewhere_are_no_rows(name: str) -> None:
    assert not is_read(name)


def test_a_branch_is_pinned_and_then_works_offline(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = {
        "data/train-00000-of-00002.parquet": parquet("a"),
        "data/train-00001-of-00002.parquet": parquet("b"),
        "data/test-00000-of-00001.parquet": parquet("t"),
    }
    junk = {"name.py": b"raise", "README.md": b"---\nlicense: mit\n---\n", "model.bin": b"x"}
    commit = hub.add("datasets/org/name", {**kept, **junk})
    said: list[str] = []
    found = locate_rows("hf:org/name", said.append)
    assert (prompts(found), found.commit) == (["a", "b"], commit) and commit[:12] in said[0]
    assert not any("test-" in path or ".py" in path or ".bin" in path for path in hub.paths())
    single = locate_rows("hf:org/name:test")
    assert prompts(single) == ["t"] and single.path.name == "test-00000-of-00001.parquet"
    later = hub.add("datasets/org/name", {"train.jsonl": lines("later")})
    num_asked = len(hub.asked)
    assert locate_rows(f"hf:org/name@{commit}") == found and len(hub.asked) == num_asked
    known = {"path": "hf:org/name", "commit": commit}
    assert locate_rows("hf:org/name", known=known) == found == rows_on_disk("hf:org/name", known)
    assert prompts(locate_rows("hf:org/name")) == ["later"]
    point_to("http://127.0.0.1:9", monkeypatch)
    assert locate_rows("hf:org/name", said.append).commit == later and "taken from the cache" in said[-1]
    told = refusal("hf:org/other", MachineError)
    assert "cannot be reached" in told.message and told.help and "model" not in told.help


def test_the_page_of_a_data_set_says_which_files(hub: Hub) -> None:
    page = b"""---
configs:
- config_name: small
  data_files:
  - {split: train, path: "s/*.jsonl"}
  - {split: held, path: ["h.jsonl"]}
- config_name: big
  default: true
  data_files: "b/**"
---
# words
"""
    files = {"s/1.jsonl": lines("s"), "h.jsonl": lines("h"), "b/c/1.jsonl": lines("b"), "README.md": page}
    hub.add("datasets/org/name", files)
    assert prompts(locate_rows("hf:org/name/small")) == ["s"]
    assert prompts(locate_rows("hf:org/name/small:held")) == ["h"]
    assert prompts(locate_rows("hf:org/name")) == ["b"]
    told = refusal("hf:org/name/small:test")
    assert "there are: train, held" in told.message and told.help == "hf:org/name/small:train"
    assert "there are: small, big" in refusal("hf:org/name/tiny").message


def test_what_there_is_not_is_told_with_what_there_is(hub: Hub) -> None:
    hub.add("datasets/org/two", {"a/train.jsonl": lines("a"), "b/train.jsonl": lines("b")})
    told = refusal("hf:org/two")
    assert "several configs; there are: a, b" in told.message and told.help == "hf:org/two/a:train"
    assert "no revision v9" in refusal("hf:org/two/a@v9").message
    assert "no repository" in refusal("hf:org/none").message
    hub.add("datasets/org/pictures", {"a.png": b"x"})
    assert ".png" in refusal("hf:org/pictures").message
    hub.failures["/api/datasets/org/two"] = (401, {})
    assert "private" in refusal("hf:org/two").message
    hub.failures["/api/datasets/org/two"] = (403, {"X-Error-Code": "GatedRepo"})
    assert "gated" in refusal("hf:org/two").message


def test_a_script_is_never_run(hub: Hub) -> None:
    hub.add("datasets/org/name", {"name.py": b"raise SystemExit", "data.zip": b"PK"})
    told = refusal("hf:org/name")
    assert told.code == "D017" and "name.py" in told.message and "never run" in told.message
    hub.add("datasets/org/name", {"default/train/0000.parquet": parquet("a")}, "refs/convert/parquet")
    said: list[str] = []
    assert prompts(locate_rows("hf:org/name", said.append)) == ["a"]
    assert "refs/convert/parquet" in said[0]
    assert not any(path.endswith(".py") for path in hub.paths())


def test_a_file_that_is_not_the_listed_one(hub: Hub) -> None:
    hub.add("datasets/org/name", {"train.jsonl": lines(*(f"q{n}" for n in range(1000)))})
    hub.spoiled.add("train.jsonl")
    assert "SHA-256" in refusal("hf:org/name").message


def test_standard_input_is_no_source_of_a_run(myna: Command) -> None:
    with pytest.raises(UsageError, match="can be read once"):
        locate_rows("-")
    done = myna("train", "--help")
    assert done.returncode == 0
    Path("r.yaml").write_text("data: {train: '-'}\n")
    assert "read once" in myna("data", "show", "r.yaml").stderr


def test_commands_take_the_name(hub: Hub, myna: Command, tiny_base: Path) -> None:
    rows = "".join(json.dumps(row) + "\n" for row in tiny.rows(20)).encode()
    commit = hub.add("datasets/org/orders", {"train.jsonl": rows})
    done = myna("data", "check", "hf:org/orders")
    assert done.returncode == 0 and "conversations 20" in " ".join(done.stdout.split())
    assert myna("data", "convert", "hf:org/orders", "-o", "out.jsonl").returncode == 0
    assert myna("init", "hf:org/orders").returncode == 0
    assert "hf:org/orders" in Path("recipe.yaml").read_text()
    Path("r.yaml").write_text(
        tiny.recipe_text(tiny_base, Path("x"), data={"train": "hf:org/orders"}, train={"max_steps": 1})
    )
    done = myna("train", "r.yaml")
    assert done.returncode == 0, done.stderr
    info = json.loads(Path("runs/orders/run.json").read_text())["data"]["train"]
    assert (info["path"], info["commit"]) == ("hf:org/orders", commit)
    hub.add("datasets/org/orders", {"train.jsonl": lines("other")})
    done = myna("train", "r.yaml", "--resume")
    assert done.returncode == 0 and "trained already" in done.stderr, done.stderr
    told = json.loads(myna("verify", "runs/orders", "--json").stdout)["findings"]
    (rows_told,) = [one for one in told if one["name"].startswith("data.train")]
    assert rows_told["verdict"] == "pass"


def test_patterns_name_some_characters_and_take_no_time() -> None:
    assert fits("data/train-07.csv", "data/train-[0-9]*.csv") and not fits(
        "data/train-x.csv", "*/train-[0-9]*"
    )
    assert not fits("a" * 250 + "b", "*a" * 60) and not fits("a/" * 100 + "b", "**/" * 60 + "a")
    old = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    for pattern in map("".join, itertools.product(("**/", "**", "*", "?", "a", "/"), repeat=3)):
        parts = re.split(r"(\*\*/?|\*|\?)", pattern)
        known = re.compile("".join(old.get(one, one) for one in parts))
        for name in map("".join, itertools.product("ab/", repeat=4)):
            assert fits(name, pattern) == (known.fullmatch(name) is not None), (name, pattern)


def test_a_config_may_name_a_folder_alone() -> None:
    page = (
        "---\nconfigs:\n- {config_name: en, data_dir: ./train/en}\n- {config_name: all, data_dir: .}\n---\n"
    )
    names = ["train/en/a.csv", "train/en/test.csv", "train/fr/a.csv"]
    found = told_configs(page, names)
    # words of the folder's own path say nothing of a split; a file without a word stands beside none that has one
    assert found["en"] == {"test": ["train/en/test.csv"]}
    assert sorted(found) == ["all", "en"] and sum(map(len, found["all"].values())) == 3

"""`myna verify`: the story of a whole run, and what it says when a file of it is no longer what it was."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
from conftest import Command

from myna.export.stage import export_stage, merge_stage
from myna.pipeline import run_recipe
from myna.recipe import load_recipe
from myna.run import Run, read_json, write_json
from myna.verify import Finding, verify_run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Run:
    """A whole run, three steps long, with its rows and base where they were."""
    folder = tmp_path_factory.mktemp("verify")
    rows = tiny.write_rows(folder / "orders.jsonl", tiny.rows(40))
    base = folder / "base"
    shutil.copytree(tiny_base, base)
    recipe = folder / "recipe.yaml"
    train = {"max_steps": 3}
    run_name = {"name": str(folder / "run")}
    recipe.write_text(tiny.recipe_text(base, rows, train=train, run=run_name), encoding="utf-8")
    result = run_recipe(load_recipe(recipe))
    return Run(Path(result["run"]))


@pytest.fixture
def run(finished: Run, tmp_path: Path) -> Run:
    """A copy, to be spoiled; its base and rows are the first one's."""
    shutil.copytree(finished.path, tmp_path / "run")
    return Run(tmp_path / "run")


def by_name(findings: list[Finding], verdict: str) -> set[str]:
    return {finding.name for finding in findings if finding.verdict == verdict}


def test_a_whole_run_holds(finished: Run, myna: Command) -> None:
    findings = verify_run(finished)
    assert by_name(findings, "fail") == by_name(findings, "gone") == set()
    names = by_name(findings, "pass")
    files = {"recipe.yaml", "plan.json", "rows/test.jsonl", "tokenizer/tokenizer.json", "parity.json"}
    files |= {"adapter/adapter_model.safetensors", "merged/model.safetensors", "evaluation.json"}
    gates = {f"Q8_0: {gate}" for gate in ("parity", "tokens", "template", "prompt", "stop", "weights")}
    assert names >= files | gates | {"merged = base + adapter", "Q8_0", "step-000003"}
    done = myna("verify", str(finished.path), "--json")
    told = json.loads(done.stdout)
    assert done.returncode == 0 and told["verdict"] == "pass" and len(told["findings"]) == len(findings)
    assert "3 steps" in told["story"]["trained"] and "held-out rows" in told["story"]["scored"]


SPOILED = [
    "recipe.yaml",
    "plan.json",
    "rows/test.jsonl",
    "tokenizer/chat_template.jinja",
    "adapter/adapter_config.json",
    "adapter/adapter_model.safetensors",
    "merged/model.safetensors",
    "evaluation.json",
    "parity.json",
]


@pytest.mark.parametrize("name", SPOILED)
def test_a_changed_file_is_named(name: str, run: Run) -> None:
    path = run.path / name
    data = bytearray(path.read_bytes())
    data[-2] ^= 1  # a bit of the last value: what reads it need not notice
    if name.endswith((".json", ".yaml")):
        data = bytearray(path.read_bytes() + b"\n")
    path.write_bytes(data)
    assert by_name(verify_run(run), "fail") == {name}


def test_a_changed_export_and_checkpoint_are_named(run: Run) -> None:
    for path in (
        run.path / "gguf" / next(iter((run.path / "gguf").iterdir())).name,
        *run.path.glob("checkpoints/*/a*"),
    ):
        path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert by_name(verify_run(run), "fail") == {"Q8_0", "step-000003"}


def delete_merged(run: Run) -> None:
    shutil.rmtree(run.merged_dir)


def delete_adapter(run: Run) -> None:
    shutil.rmtree(run.adapter_dir)


def add_a_file(run: Run) -> None:
    (run.tokenizer_dir / "added_tokens.json").write_text("{}")


def lower_a_gate(run: Run) -> None:
    parity = read_json(run.parity_path)
    parity["files"]["Q8_0"]["verdict"] = "fail"
    write_json(run.parity_path, parity)
    run.record([run.parity_path])


@pytest.mark.parametrize(
    ("spoil", "fails", "gone"),
    [
        (delete_merged, set(), {"merged/model.safetensors", "merged/config.json"}),
        (delete_adapter, {"adapter/adapter_model.safetensors", "adapter/adapter_config.json"}, set()),
        (add_a_file, {"tokenizer/added_tokens.json"}, set()),
        (lower_a_gate, {"Q8_0: parity"}, set()),
    ],
)
def test_what_is_gone_or_came(
    spoil: Callable[[Run], None], fails: set[str], gone: set[str], run: Run, myna: Command
) -> None:
    spoil(run)
    findings = verify_run(run)
    assert by_name(findings, "fail") == fails
    assert by_name(findings, "gone") >= gone
    done = myna("verify", str(run.path), "--json")
    told = json.loads(done.stdout)
    assert done.returncode == (5 if fails else 0)
    assert ("error" in told) == bool(fails)
    plain = myna("verify", str(run.path))
    assert plain.returncode == done.returncode
    assert all(name in plain.stdout for name in fails | gone)


def test_another_base_and_other_rows_are_told(run: Run) -> None:
    info = run.info()
    info["base"]["sha256"] = "0" * 64
    info["data"]["train"]["sha256"] = "1" * 64
    write_json(run.path / "run.json", info)
    failed = {f.name.split()[0]: f.detail for f in verify_run(run) if f.verdict == "fail"}
    assert failed.keys() == {"base", "data.train"}
    assert "not those the run was trained on" in failed["base"]


def test_a_stage_made_again_is_recorded_again(run: Run) -> None:
    """Another type is exported, merged is written anew: nothing is left that only the old digest fits."""
    merge_stage(run, again=True)
    export_stage(run, ["F16"])
    assert by_name(verify_run(run), "fail") == set()
    assert {"F16", "F16: weights"} <= by_name(verify_run(run), "pass")

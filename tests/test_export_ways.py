"""The other ways to export: the adapter alone, straight from base + adapter, with importance."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import pytest
import tiny
from conftest import Command

from myna.errors import CheckFailed
from myna.export import adapter_gguf, adapter_stage
from myna.export import gguf as gguf_module
from myna.export.parity import BOUNDS, Bound
from myna.export.stage import export_stage
from myna.pipeline import outcome
from myna.run import Run, file_sha256, read_json
from myna.stored import held_out, training_rows
from myna.verify import verify_run


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """A run that is trained and no more; its folder's parent holds recipe and rows."""
    from myna.pipeline import train_stage
    from myna.recipe import load_recipe

    folder = tmp_path_factory.mktemp("ways")
    rows = tiny.write_rows(folder / "orders.jsonl", tiny.rows(40))
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        tiny.recipe_text(tiny_base, rows, train={"max_steps": 4}, run={"name": str(folder / "run")})
    )
    return train_stage(load_recipe(recipe)).path


def test_straight_from_the_adapter_is_the_file_from_merged(trained: Path, myna: Command) -> None:
    done = myna("export", str(trained), "--quantize", "Q8_0", "--direct", "--json")
    told = json.loads(done.stdout)
    assert done.returncode == 0, done.stderr
    assert not (trained / "merged").exists() and Run(trained).stage("merge") is None
    assert "Q8_0 against base + adapter" in done.stderr
    straight = file_sha256(Path(told["files"]["Q8_0"]))
    Path(told["files"]["Q8_0"]).unlink()
    again = myna("export", str(trained), "--quantize", "Q8_0")
    assert again.returncode == 0 and "Q8_0 against merged" in again.stderr
    assert file_sha256(Path(told["files"]["Q8_0"])) == straight
    assert not [finding for finding in verify_run(Run(trained)) if finding.verdict == "fail"]


def test_the_adapter_alone(trained: Path, myna: Command) -> None:
    done = myna("export", str(trained), "--adapter", "--json")
    told = json.loads(done.stdout)
    assert done.returncode == 0, done.stderr
    assert list(told["files"]) == ["adapter"]
    path = Path(told["files"]["adapter"])
    assert path.name == "run-adapter.gguf"
    assert gguf.GGUFReader(path).fields["adapter.type"].contents() == "lora"
    measured = told["parity"]["adapter_file"]
    assert measured["verdict"] == "pass" and measured["mean_kl"] < 1e-4
    assert not list(path.parent.glob(".unproven*"))
    assert {"gguf/run-adapter.gguf", "adapter file: parity"} <= {f.name for f in verify_run(Run(trained))}
    assert "already" in myna("export", str(trained), "--adapter").stderr


def test_an_adapter_file_that_is_not_the_adapter_fails(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: thirty times the alpha."""
    run = Run(trained)
    (run.gguf_dir / "run-adapter.gguf").unlink(missing_ok=True)
    honest = adapter_gguf._factors

    def wrong(*arguments: Any) -> tuple[Any, Any]:
        a_rows, b_rows = honest(*arguments)
        return a_rows, 30 * b_rows

    monkeypatch.setattr(adapter_gguf, "_factors", wrong)
    with pytest.raises(CheckFailed, match="is not base \\+ adapter"):
        adapter_stage.adapter_stage(run)
    assert (run.gguf_dir / "run-adapter.failed.gguf").is_file()
    assert not (run.gguf_dir / "run-adapter.gguf").exists()


def test_few_bits_do_not_hide_a_wrong_structure(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: rows of q and k not turned, exported as a type that loses so much anyway that it might pass."""
    run = Run(trained)
    monkeypatch.setitem(BOUNDS, "Q2_K", Bound(100.0, 1.0))
    export_stage(run, ["Q2_K"], direct=True)
    assert run.gguf_path("Q2_K").is_file() and not list(run.gguf_dir.glob("*Q8_0*unproven*"))
    run.gguf_path("Q2_K").unlink()
    monkeypatch.setattr(gguf_module, "turned", lambda family, config, tensor, rows: rows)
    with pytest.raises(CheckFailed, match="structure: Q8_0, written in the same way, fails"):
        export_stage(run, ["Q2_K"], direct=True)


def test_a_failed_file_leaves_the_good_one_and_its_record(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Q6_K fails beside a good F16: what is said of that one stays, nothing unproven does."""
    shutil.copytree(trained, tmp_path / "run")
    run = Run(tmp_path / "run")
    (run.gguf_dir / ".unproven-left.gguf").parent.mkdir(exist_ok=True)
    (run.gguf_dir / ".unproven-left.gguf").write_bytes(b"killed")
    export_stage(run, ["F16"], direct=True)
    before = read_json(run.parity_path)["files"]["F16"]
    honest = BOUNDS["Q6_K"]
    monkeypatch.setitem(BOUNDS, "Q6_K", Bound(0.0, 0.0))
    with pytest.raises(CheckFailed):
        export_stage(run, ["Q6_K"], direct=True)
    parity = read_json(run.parity_path)
    assert parity["verdict"] == "fail" and parity["files"]["F16"] == before
    assert parity["failed"]["Q6_K"]["verdict"] == "fail" and "Q6_K" not in parity["files"]
    assert {p.name for p in run.gguf_dir.iterdir()} >= {"run-F16.gguf", "run-Q6_K.failed.gguf"}
    assert not list(run.gguf_dir.glob(".*"))
    assert not [finding for finding in verify_run(run) if finding.verdict == "fail"]
    assert "Q6_K" not in (run.path / "README.md").read_text()
    monkeypatch.setitem(BOUNDS, "Q6_K", honest)
    export_stage(run, ["Q6_K"], direct=True)
    parity = read_json(run.parity_path)
    assert (
        set(parity["files"]) >= {"F16", "Q6_K"}
        and "Q6_K" not in parity["failed"]
        and parity["verdict"] == "pass"
    )
    assert not (run.gguf_dir / "run-Q6_K.failed.gguf").exists()
    assert outcome(run)["parity"]["verdict"] == "pass"  # nothing was merged, and nothing had to be


def test_a_type_that_needs_importance_is_refused_before_anything(
    trained: Path, tmp_path: Path, myna: Command
) -> None:
    done = myna("export", str(trained), "--quantize", "Q8_0,Q2_K_S")
    assert done.returncode == 2 and "needs an importance matrix" in done.stderr
    assert (
        "merge" not in done.stderr
    )  # minutes, for a large model, before a word that could have been said at once
    unknown = myna("export", str(trained), "--quantize", "Q4_X")
    assert unknown.returncode == 2 and "merge" not in unknown.stderr
    rows = tiny.write_rows(tmp_path / "r.jsonl", tiny.rows(9))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(tiny.recipe_text(tmp_path / "nowhere", rows, export={"quantize": ["Q2_K_S"]}))
    assert "needs an importance matrix" in myna("train", str(recipe)).stderr


def test_what_is_held_out_is_not_measured_on(trained: Path) -> None:
    tested = {row.messages for row in held_out(Run(trained))}
    training = {row.messages for row in training_rows(Run(trained), 500)}
    assert tested and len(training) == 40 - len(tested) and not tested & training


def test_importance_is_measured_used_and_said(
    trained: Path, tiny_base: Path, tmp_path: Path, myna: Command
) -> None:
    rows = tiny.write_rows(tmp_path / "orders.jsonl", tiny.rows(40))
    recipe = tmp_path / "recipe.yaml"
    settings = {"quantize": ["Q4_0", "Q2_K_S"], "importance": True}
    recipe.write_text(tiny.recipe_text(tiny_base, rows, train={"max_steps": 2}, export=settings))
    assert myna("train", str(recipe)).returncode == 0
    done = myna("export", "orders", "--json")
    assert "measuring importance over" in done.stderr
    run = Run(tmp_path / "runs/orders")
    files = (run.stage("export") or {})["files"]
    assert done.returncode in (0, 5), done.stderr  # two bits are too few for a random model
    path = next(run.gguf_dir.glob("*Q4_0*.gguf"))
    fields = gguf.GGUFReader(path).fields
    assert fields["quantize.imatrix.dataset"].contents() == "orders.jsonl"
    assert fields["quantize.imatrix.chunks_count"].contents() > 5
    if "Q4_0" in files:
        assert files["Q4_0"]["importance"] == fields["quantize.imatrix.chunks_count"].contents()
    plain = myna(
        "run", str(recipe), "--resume", "--set", "export.importance=false", "--set", "export.quantize=[Q4_0]"
    )
    assert plain.returncode in (0, 5)
    path = next(run.gguf_dir.glob("*Q4_0*.gguf"))
    assert "quantize.imatrix.dataset" not in gguf.GGUFReader(path).fields

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


def test_what_was_set_aside_or_left_is_listed_and_no_failure(run: Run, myna: Command) -> None:
    folder = run.checkpoints_dir
    shutil.copytree(folder / "step-000003", folder / "step-000002.damaged")
    (folder / ".tmp-step-000004-abc").mkdir()
    found = verify_run(run)
    assert by_name(found, "aside") == {"step-000002.damaged", ".tmp-step-000004-abc"}
    assert by_name(found, "fail") == set()
    done = myna("verify", str(run.path.absolute()))
    assert done.returncode == 0 and "aside" in done.stdout


@pytest.mark.parametrize(
    "name", ["MANIFEST.json", "state.json", "adapter.safetensors", "optimizer.safetensors"]
)
def test_every_file_of_a_checkpoint_is_looked_at(run: Run, name: str) -> None:
    path = run.checkpoints_dir / "step-000003" / name
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    (finding,) = [f for f in verify_run(run) if f.verdict == "fail"]
    assert finding.name == "step-000003" and name in finding.detail


def test_a_checkpoint_of_something_else_is_named(run: Run) -> None:
    """Whole, but of another plan than the run's."""
    plan = read_json(run.plan_path)
    write_json(run.plan_path, plan | {"threads": plan["threads"] + 1})
    run.record([run.plan_path])
    (finding,) = [f for f in verify_run(run) if f.verdict == "fail"]
    assert finding.name == "step-000003" and "plan.json: threads" in finding.detail


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
    assert failed.keys() == {"base", "data.train", "step-000003"}
    assert "not those the run was trained on" in failed["base"]


def test_a_stage_made_again_is_recorded_again(run: Run) -> None:
    """Another type is exported, merged is written anew: nothing is left that only the old digest fits."""
    merge_stage(run, again=True)
    export_stage(run, ["F16"])
    assert by_name(verify_run(run), "fail") == set()
    assert {"F16", "F16: weights"} <= by_name(verify_run(run), "pass")


def truncate_parity(run: Run) -> None:
    run.parity_path.write_text('{"merged":')


def parity_without_a_key(run: Run) -> None:
    parity = read_json(run.parity_path)
    del parity["merged"]["bound"]
    write_json(run.parity_path, parity)


def parity_of_another_kind(run: Run) -> None:
    write_json(run.parity_path, read_json(run.parity_path) | {"files": ["Q8_0"]})


def delete_recipe(run: Run) -> None:
    run.recipe_path.unlink()


def spoil_evaluation(run: Run) -> None:
    run.evaluation_path.write_text("x")


def evaluation_without_results(run: Run) -> None:
    write_json(run.evaluation_path, {"rows": 4, "results": {"base": {}}})


@pytest.mark.parametrize(
    ("spoil", "name"),
    [
        (truncate_parity, "parity.json"),
        (parity_without_a_key, "parity.json"),
        (parity_of_another_kind, "parity.json"),
        (delete_recipe, "recipe.yaml"),
        (spoil_evaluation, "evaluation.json"),
        (evaluation_without_results, "evaluation.json"),
    ],
)
@pytest.mark.parametrize("recorded", [True, False])
def test_a_spoiled_file_is_a_finding(
    spoil: Callable[[Run], None], name: str, recorded: bool, run: Run, myna: Command
) -> None:
    spoil(run)
    if recorded and (run.path / name).is_file():  # then it is not the digest that tells it
        run.record([run.path / name])
    done = myna("verify", str(run.path), "--json")
    assert done.returncode == 5, done.stderr
    told = json.loads(done.stdout)
    assert {f["name"] for f in told["findings"] if f["verdict"] == "fail"} == {name}
    assert "made" in told["story"] and ("trained" in told["story"]) == (name != "recipe.yaml")
    assert myna("verify", str(run.path)).returncode == 5


def made_before_digests(run: Run) -> None:
    info = run.info()
    del info["digests"]
    write_json(run.path / "run.json", info)


def test_a_run_made_before_digests_is_compared_as_far_as_it_can_be(run: Run) -> None:
    made_before_digests(run)
    (run.merged_dir / "mine.txt").write_text("kept nowhere")
    run.record([run.evaluation_path])  # what a new stage does
    findings = verify_run(run)
    assert by_name(findings, "fail") == set() and by_name(findings, "gone") == {"digests"}
    assert "adapter/adapter_model.safetensors" in by_name(findings, "pass")
    detail = next(f.detail for f in findings if f.name == "digests")
    assert "before digests were kept" in detail and "adapter" in detail and "merged" in detail
    (run.adapter_dir / "adapter_model.safetensors").write_bytes(b"x")
    assert by_name(verify_run(run), "fail") == {"adapter/adapter_model.safetensors"}


def test_a_broken_base_on_this_disk_is_not_gone(run: Run, tmp_path: Path) -> None:
    base = Path(next(f for f in verify_run(run) if f.name.startswith("base ")).name.removeprefix("base "))
    weights = base / "model.safetensors"
    whole = weights.read_bytes()
    try:
        weights.write_bytes(whole[:-100])
        found = {f.verdict for f in verify_run(run) if f.name == f"base {base}"}
        assert found == {"fail"}
        weights.write_bytes(whole)
        config = (base / "config.json").read_text()
        (base / "config.json").write_text(json.dumps(json.loads(config) | {"rms_norm_eps": 0.1}))
        told = next(f for f in verify_run(run) if f.name == f"base {base}")
        assert told.verdict == "fail" and "config.json" in told.detail
        (base / "config.json").write_text(config)
        base.rename(base.with_name("away"))
        assert {f.verdict for f in verify_run(run) if f.name == f"base {base}"} == {"gone"}
        base.with_name("away").rename(base)
    finally:
        weights.write_bytes(whole)


def test_a_type_that_was_refused_its_name_is_told(run: Run, myna: Command) -> None:
    parity = read_json(run.parity_path)
    entry = parity["files"]["Q8_0"]
    far = {**entry, "verdict": "fail", "mean_kl": 3.5}
    unloadable = {"verdict": "fail", "gates": {"loads": {"verdict": "fail", "detail": "llama.cpp says no"}}}
    write_json(run.parity_path, parity | {"failed": {"Q2_K": far, "F16": unloadable}})
    run.record([run.parity_path])
    refused = {f.name: f.detail for f in verify_run(run) if f.verdict == "refused"}
    assert refused.keys() == {"Q2_K: not exported", "F16: not exported"}
    assert "mean KL 3.5" in refused["Q2_K: not exported"] and "says no" in refused["F16: not exported"]
    plain = myna("verify", str(run.path))
    assert plain.returncode == 0 and "refused" in plain.stdout


def test_forged_metrics_and_scores_of_other_rows_are_told(run: Run) -> None:
    run.metrics_path.write_text('{"step": 1, "loss": 0.0, "target_tokens": 1}\n')
    run.test_path.write_text("".join(run.test_path.read_text().splitlines(keepends=True)[1:]))
    run.record([run.test_path])
    found = {f.name: f.detail for f in verify_run(run) if f.verdict == "fail"}
    assert found.keys() == {"metrics.jsonl", "evaluation.json"}
    assert found["evaluation.json"] == "evaluation.json is of other rows"


def test_what_a_desktop_leaves_fails_nothing(run: Run) -> None:
    for name in (".DS_Store", "Thumbs.db"):
        (run.merged_dir / name).write_bytes(b"x")
    assert by_name(verify_run(run), "fail") == set()


def test_merged_that_changed_is_not_measured_as_tuned(run: Run) -> None:
    from myna.errors import RecipeError
    from myna.evaluate.stage import evaluate_stage

    path = run.merged_dir / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-2] + b"xx")
    with pytest.raises(RecipeError, match="merged/"):
        evaluate_stage(run, again=True)


def test_an_exported_file_that_changed_is_not_measured(run: Run) -> None:
    """Its scores would be entered under the digest of the file that was exported."""
    from myna.errors import RecipeError
    from myna.evaluate.stage import evaluate_stage

    path = next(run.gguf_dir.glob("*.gguf"))
    path.write_bytes(path.read_bytes()[:-2] + b"xx")
    with pytest.raises(RecipeError, match="is not the file that was exported") as caught:
        evaluate_stage(run)
    assert "myna export" in (caught.value.help or "") and caught.value.code == "changed"

"""The stages merge and export: adapter/ → merged/ → gguf/, each shown to be the same as the one before (parity.json)."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from myna.data.render import load_chat_tokenizer, render_example
from myna.engine.memory import forget_models
from myna.errors import CheckFailed, UsageError
from myna.export.card import model_card
from myna.export.encoder import Floats
from myna.export.parity import choose_rows
from myna.export.prove import Origin, Questions, prove_files, questions
from myna.export.quantize import quant_type
from myna.recipe import Recipe
from myna.run import Run, lock_run, read_json, write_json, write_text
from myna.show import Show
from myna.stored import held_out, is_whole, model_dir, require_model, run_base, stored_recipe, training_rows

IMPORTANCE_ROWS, IMPORTANCE_TOKENS = 500, 20_000  # what the importance matrix is measured over, at most


def merge_stage(run: Run, *, show: Show | None = None, again: bool = False) -> dict[str, Any]:
    """Writes merged/ and its part of parity.json; raises CheckFailed where merged is not base + adapter."""
    from myna.export.merge import merge

    show = show or Show()
    run.require_stage("train", "myna train RECIPE --resume")
    done = run.stage("merge")
    if done and run.merged_dir.is_dir() and not again:
        show.say("merged already")
        return done
    show.stage("merge")
    started = time.perf_counter()
    recipe = stored_recipe(run)
    with lock_run(run):
        base = run_base(run, show.say)
        rows = [[int(i) for i in row.input_ids_T] for row in run_questions(run, recipe).rows]
        merged = merge(
            base.folder,
            run.adapter_dir,
            run.tokenizer_dir,
            run.merged_dir,
            dtype=recipe.export.dtype,
            rows=rows,
        )
        update_parity(run, {"verdict": "pass", "merged": dict(merged.as_json())})
        entry = {"seconds": round(time.perf_counter() - started, 1), "dtype": recipe.export.dtype}
        run.finish_stage("merge", entry, [run.merged_dir, run.parity_path])
    show.say(
        f"merged = base + adapter: max |Δ logit| {merged.max_abs:.1e}, relative {merged.relative:.1e} "
        f"over {merged.num_tokens:,} tokens"
    )
    forget_models()
    return entry


def export_stage(
    run: Run, file_types: Sequence[str], *, show: Show | None = None, direct: bool = False
) -> dict[str, Any]:
    """Writes the GGUF files that are not there yet, proves each, and names those that pass.

    With `direct` they are made from base + adapter, and measured against it, without a merged copy. A file that fails
    keeps the name NAME-TYPE.failed.gguf, and CheckFailed is raised after all are measured.
    """
    show = show or Show()
    for file_type in file_types:
        quant_type(file_type)
    files: dict[str, Any] = dict((run.stage("export") or {}).get("files", {}))
    recipe = stored_recipe(run)
    missing = [t for t in dict.fromkeys(file_types) if not _is_there(run, t, files, recipe.export.importance)]
    if not missing:
        show.say("exported already")
        return files
    show.stage("export")
    started = time.perf_counter()
    with lock_run(run):
        origin = origin_of(run, recipe, show, direct=direct)
        weighed = _importance(run, recipe, origin, show) if recipe.export.importance else None
        written = {t: _write_file(run, t, origin, weighed, show) for t in missing}
        failed = _prove(run, recipe, origin, written, show)
        passed = {t: entry for t, entry in written.items() if t not in failed}
        for file_type in passed:
            os.replace(_unproven(run, file_type), run.gguf_path(file_type))
        for file_type in failed:
            os.replace(_unproven(run, file_type), run.gguf_path(file_type).with_suffix(".failed.gguf"))
        files |= passed
        seconds = (run.stage("export") or {}).get("seconds", 0.0) + time.perf_counter() - started
        run.finish_stage("export", {"seconds": round(seconds, 1), "files": files}, [run.parity_path])
        write_text(run.path / "README.md", model_card(run, recipe))
    if failed:
        raise CheckFailed(
            "; ".join(failed.values()),
            where=str(run.parity_path),
            help="the file is kept as NAME-TYPE.failed.gguf; a larger type (Q5_K_M, Q6_K, Q8_0) is nearer",
            code="parity",
        )
    return files


def origin_of(run: Run, recipe: Recipe, show: Show, *, direct: bool) -> Origin:
    """What a run's files are made from: its merged model, the model it was given, or base + adapter."""
    if direct:
        run.require_stage("train", "myna train RECIPE --resume")
        return Origin("base + adapter", run_base(run, show.say).folder, run.adapter_dir)
    require_model(run)
    name = "the model it was made from" if is_whole(run) else "merged"
    return Origin(name, model_dir(run), dtype=recipe.export.dtype)


def run_questions(run: Run, recipe: Recipe) -> Questions:
    """What a run's files are asked: its held-out rows, training rows after them, and the fixed conversations."""
    assert recipe.data.max_length is not None
    tokenizer = load_chat_tokenizer(run.tokenizer_dir)
    return questions(tokenizer, held_out(run), lambda: training_rows(run, 100), recipe.data.max_length)


def _is_there(run: Run, file_type: str, files: Mapping[str, Any], with_importance: bool) -> bool:
    """Whether a type is exported, and as the recipe now has it."""
    entry = files.get(file_type)
    return (
        entry is not None
        and run.gguf_path(file_type).is_file()
        and bool(entry.get("importance")) == with_importance
    )


@dataclass(frozen=True)
class Importance:
    """What was measured over training rows for the encoder, and what the file says of it."""

    by_tensor: Mapping[str, Floats]
    keys: Mapping[str, str | int]
    num_rows: int


def _importance(run: Run, recipe: Recipe, origin: Origin, show: Show) -> Importance:
    """Over training rows, up to IMPORTANCE_TOKENS tokens; what was given without rows has none to measure on."""
    from myna.export.importance import importance_keys, measure_importance
    from myna.model.families import family_of

    tokenizer = load_chat_tokenizer(run.tokenizer_dir)
    assert recipe.data.max_length is not None
    examples = [
        render_example(row, tokenizer, recipe.data.max_length) for row in training_rows(run, IMPORTANCE_ROWS)
    ]
    rows = [[int(i) for i in row.input_ids_T] for row in choose_rows(examples, IMPORTANCE_TOKENS)]
    if not rows:
        raise UsageError(
            "export.importance: there are no training rows to measure it on",
            where=str(run.path),
            help="--rows FILE gives some, or set export.importance: false",
        )
    show.say(f"measuring importance over {len(rows)} training rows")
    model = origin.plain_model()
    count = lambda done, total: show.progress("importance, row", done, total)  # noqa: E731
    measured = measure_importance(model, family_of(model.config.to_dict()), rows, progress=count)
    del model
    forget_models()
    return Importance(measured, importance_keys(measured, len(rows), Path(recipe.data.train).name), len(rows))


def _unproven(run: Run, file_type: str) -> Path:
    return run.gguf_dir / f".unproven-{run.gguf_path(file_type).name}"


def _write_file(
    run: Run, file_type: str, origin: Origin, weighed: Importance | None, show: Show
) -> dict[str, Any]:
    from myna.export.gguf import write_gguf

    path = _unproven(run, file_type)
    path.parent.mkdir(parents=True, exist_ok=True)
    with origin.weights() as weights:
        summary = write_gguf(
            origin.folder,
            run.tokenizer_dir,
            path,
            file_type,
            name=run.name,
            weights=weights,
            importance=weighed.by_tensor if weighed else None,
            keys=weighed.keys if weighed else None,
            progress=lambda done, total: show.progress(f"writing {file_type}", done, total),
        )
    return {
        "path": str(run.gguf_path(file_type).relative_to(run.path)),
        "bytes": summary.bytes,
        "sha256": summary.sha256,
        "types": summary.types,
        "importance": weighed.num_rows if weighed else 0,
    }


def _prove(
    run: Run, recipe: Recipe, origin: Origin, written: Mapping[str, dict[str, Any]], show: Show
) -> dict[str, str]:
    """Proves files, writes parity.json, and returns file type → why for those that fail."""
    asked = run_questions(run, recipe)
    unproven = {t: _unproven(run, t) for t in written}
    proofs = prove_files(origin, unproven, asked, show, with_importance=recipe.export.importance)
    forget_models()
    failed = {}
    for file_type, proof in proofs.items():
        show.say(proof.sentence(file_type, origin.name))
        if proof.failures:
            failed[file_type] = f"{file_type}: {'; '.join(proof.failures)}"
    entries = {
        t: {**proof.as_json(), "types": written[t]["types"], "bytes": written[t]["bytes"]}
        for t, proof in proofs.items()
    }
    before = read_json(run.parity_path).get("files", {}) if run.parity_path.is_file() else {}
    files = {**before, **entries}
    update = {
        "verdict": "pass" if all(entry["verdict"] == "pass" for entry in files.values()) else "fail",
        "tokens_equal": all(entry["gates"]["tokens"]["verdict"] == "pass" for entry in entries.values()),
        "num_tokens": asked.num_tokens,
        "files": files,
    }
    update_parity(run, update)
    return failed


def update_parity(run: Run, update: Mapping[str, Any]) -> None:
    """Enters what was measured into parity.json."""
    before = read_json(run.parity_path) if run.parity_path.is_file() else {}
    write_json(run.parity_path, {**before, **update})

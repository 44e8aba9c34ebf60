"""The stages merge and export: adapter/ → merged/ → gguf/, each shown to be the same as the one before (parity.json)."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from myna.backends.llama_cpp import LlamaCppBackend
from myna.data.conversation import Conversation
from myna.data.render import Example, load_chat_tokenizer, render_example
from myna.engine.memory import forget_models
from myna.errors import CheckFailed, DataError
from myna.export.card import model_card
from myna.export.parity import ENOUGH_TOKENS, FileParity, choose_rows, compare_files, first_token_difference
from myna.export.quantize import quant_type
from myna.recipe import Recipe
from myna.run import Run, lock_run, read_json, write_json, write_text
from myna.show import Show
from myna.stored import held_out, model_dir, run_base, stored_recipe


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
        rows = [[int(i) for i in row.input_ids_T] for row in _parity_rows(run, recipe)]
        merged = merge(
            base.folder,
            run.adapter_dir,
            run.tokenizer_dir,
            run.merged_dir,
            dtype=recipe.export.dtype,
            rows=rows,
        )
        _update_json(run.parity_path, {"verdict": "pass", "merged": dict(merged.as_json())})
        entry = {"seconds": round(time.perf_counter() - started, 1), "dtype": recipe.export.dtype}
        run.finish_stage("merge", entry)
    show.say(
        f"merged = base + adapter: max |Δ logit| {merged.max_abs:.1e}, relative {merged.relative:.1e} "
        f"over {merged.num_tokens:,} tokens"
    )
    forget_models()
    return entry


def export_stage(run: Run, file_types: Sequence[str], *, show: Show | None = None) -> dict[str, Any]:
    """Writes the GGUF files that are not there yet, measures them against merged, and names those that pass.

    A file beyond its bound keeps the name NAME-TYPE.failed.gguf, and CheckFailed is raised after all are measured.
    """
    show = show or Show()
    for file_type in file_types:
        quant_type(file_type)
    run.require_stage("merge", f"myna merge {run.path}")
    files: dict[str, Any] = dict((run.stage("export") or {}).get("files", {}))
    missing = [t for t in dict.fromkeys(file_types) if t not in files or not run.gguf_path(t).is_file()]
    if not missing:
        show.say("exported already")
        return files
    show.stage("export")
    started = time.perf_counter()
    with lock_run(run):
        written = {t: _write_file(run, t, show) for t in missing}
        failed = _prove(run, written, show)
        passed = {t: entry for t, entry in written.items() if t not in failed}
        for file_type in passed:
            os.replace(_unproven(run, file_type), run.gguf_path(file_type))
        for file_type in failed:
            os.replace(_unproven(run, file_type), run.gguf_path(file_type).with_suffix(".failed.gguf"))
        files |= passed
        seconds = (run.stage("export") or {}).get("seconds", 0.0) + time.perf_counter() - started
        run.finish_stage("export", {"seconds": round(seconds, 1), "files": files})
        write_text(run.path / "README.md", model_card(run, stored_recipe(run)))
    if failed:
        raise CheckFailed(
            "; ".join(failed.values()),
            where=str(run.parity_path),
            help="the file is kept as NAME-TYPE.failed.gguf; a larger type (Q5_K_M, Q6_K, Q8_0) is nearer to merged",
            code="parity",
        )
    return files


def _parity_rows(run: Run, recipe: Recipe) -> list[Example]:
    """Held-out rows with at least 1,000 tokens together; where they have fewer, training rows after them."""
    from myna.data.rows import load_conversations

    rows: list[Conversation] = list(held_out(run))
    tokenizer = load_chat_tokenizer(run.tokenizer_dir)
    assert recipe.data.max_length is not None
    num_tokens = sum(len(render_example(row, tokenizer, recipe.data.max_length).input_ids_T) for row in rows)
    if num_tokens < ENOUGH_TOKENS:
        data = recipe.data
        loaded = load_conversations(
            Path(data.train), format_name=data.format, columns=data.columns, max_rows=100
        )
        rows += [row.with_system(data.system) for row in loaded.conversations]
    examples = (render_example(row, tokenizer, recipe.data.max_length) for row in rows)
    chosen = choose_rows([example for example in examples if example.num_targets])
    if not chosen:
        raise DataError("no row with target tokens is left to measure the model on", where=recipe.data.train)
    return chosen


def _unproven(run: Run, file_type: str) -> Path:
    return run.gguf_dir / f".unproven-{run.gguf_path(file_type).name}"


def _write_file(run: Run, file_type: str, show: Show) -> dict[str, Any]:
    from myna.export.gguf import write_gguf

    path = _unproven(run, file_type)
    path.parent.mkdir(parents=True, exist_ok=True)
    summary = write_gguf(
        model_dir(run),
        run.tokenizer_dir,
        path,
        file_type,
        name=run.name,
        progress=lambda done, total: show.progress(f"writing {file_type}", done, total),
    )
    return {
        "path": str(run.gguf_path(file_type).relative_to(run.path)),
        "bytes": summary.bytes,
        "sha256": summary.sha256,
        "types": summary.types,
    }


def _prove(run: Run, written: Mapping[str, dict[str, Any]], show: Show) -> dict[str, str]:
    """Measures files against merged, writes parity.json, and returns file type → why for those that fail."""
    rows = _parity_rows(run, stored_recipe(run))
    measured, difference = _measure(run, list(written), rows, show)
    forget_models()
    failed = dict.fromkeys(written, "the tokens differ: " + difference) if difference else {}
    for file_type, parity in measured.items():
        show.say(
            f"{file_type} = merged: mean KL {parity.mean_kl:.4f}, same top token {parity.same_top:.1%} "
            f"over {parity.num_targets:,} target tokens (all {parity.num_tokens:,}: {parity.mean_kl_all:.4f})"
        )
        if not parity.passes:
            failed[file_type] = f"{file_type}: mean KL {parity.mean_kl:.4f} is beyond {parity.bound}"
    entries = {
        t: {**parity.as_json(), "types": written[t]["types"], "bytes": written[t]["bytes"]}
        for t, parity in measured.items()
    }
    files = {**read_json(run.parity_path).get("files", {}), **entries}
    passes = not failed and all(entry["verdict"] == "pass" for entry in files.values())
    update = {
        "verdict": "pass" if passes else "fail",
        "tokens_equal": difference is None,
        "num_tokens": sum(len(row.input_ids_T) for row in rows),
        "files": files,
    }
    _update_json(run.parity_path, update)
    return failed


def _measure(
    run: Run, file_types: Sequence[str], rows: Sequence[Example], show: Show
) -> tuple[dict[str, FileParity], str | None]:
    """(each unproven file against merged, the first difference in token ids if there is one)."""
    from myna.backends.torch_backend import TorchBackend
    from myna.model.load import load_base

    tokenizer = load_chat_tokenizer(run.tokenizer_dir)
    context = max(len(row.input_ids_T) for row in rows)
    merged = TorchBackend(load_base(model_dir(run), stored_recipe(run).export.dtype), "merged")
    with ExitStack() as stack:
        files = {t: LlamaCppBackend(_unproven(run, t), context=context) for t in file_types}
        for backend in files.values():
            stack.callback(backend.close)
        measured = compare_files(merged, files, rows, show.counter("comparing with merged", len(rows)))
        first = next(iter(files.values()))
        difference = first_token_difference(held_out(run)[:50], tokenizer, first.tokenize)
    return measured, difference


def _update_json(path: Path, update: dict[str, Any]) -> None:
    write_json(path, {**(read_json(path) if path.is_file() else {}), **update})

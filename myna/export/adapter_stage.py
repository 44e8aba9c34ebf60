"""`export --adapter`: the adapter alone as GGUF, shown to make of the base what merging makes of it."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from myna.backends.llama_cpp import LlamaCppBackend
from myna.engine.memory import forget_models
from myna.errors import CheckFailed, UsageError
from myna.export.parity import BOUNDS, FileParity, compare_file
from myna.export.prove import Origin, Questions, unproven
from myna.export.stage import file_context, run_questions, update_parity
from myna.lock import lock_run
from myna.model.load import read_config
from myna.run import Run
from myna.show import Show
from myna.stored import is_whole, require_unchanged, run_base, stored_recipe


def adapter_stage(run: Run, *, show: Show | None = None) -> dict[str, Any]:
    """Writes gguf/NAME-adapter.gguf and measures base file + adapter file against base + adapter.

    The base's file is only made to measure with, in 16 bits, and goes again. Returns the entry of run.json:
    path, bytes, sha256, mean_kl. CheckFailed where the two differ, and the file keeps the name …failed.gguf.
    """
    show = show or Show()
    if is_whole(run):
        raise UsageError("there is no adapter: this run is of a whole model", where=str(run.path))
    run.require_stage("train", "myna train RECIPE --resume")
    path = run.gguf_dir / f"{run.name}-adapter.gguf"
    with lock_run(run):
        done = run.stage("export_adapter")
        if done and path.is_file():
            show.say("the adapter is exported already")
            return done
        show.stage("export the adapter")
        started = time.perf_counter()
        require_unchanged(run, run.adapter_dir)
        entry, parity = _write_and_measure(run, path, show)
        passes = not parity.failures
        os.replace(unproven(path), path if passes else path.with_suffix(".failed.gguf"))
        update_parity(run, {"adapter_file": {**parity.as_json(), "verdict": "pass" if passes else "fail"}})
        if not passes:
            raise CheckFailed(
                f"base + {path.name} is not base + adapter: {'; '.join(parity.failures)}",
                where=str(run.parity_path),
                help="the file is kept as …failed.gguf; `myna export` without --adapter ships the merged model",
                code="parity",
            )
        path.with_suffix(".failed.gguf").unlink(missing_ok=True)
        entry |= {"seconds": round(time.perf_counter() - started, 1)}
        run.finish_stage("export_adapter", entry, [path])
    return entry


def _write_and_measure(run: Run, path: Path, show: Show) -> tuple[dict[str, Any], FileParity]:
    from myna.export.adapter_gguf import write_adapter_gguf

    base = run_base(run, show.say).folder
    summary = write_adapter_gguf(run.adapter_dir, base, unproven(path), name=run.name)
    asked = run_questions(run, stored_recipe(run), file_context(base))
    with _base_file(run, base) as (file_type, base_path):
        parity = _measure(
            Origin("base + adapter", base, run.adapter_dir), file_type, base_path, path, asked, show
        )
    forget_models()
    show.say(
        f"base file + adapter file = base + adapter: mean KL {parity.mean_kl:.5f}, same top token "
        f"{parity.same_top:.1%} over {parity.num_targets:,} target tokens"
    )
    entry = {
        "path": path.relative_to(run.path).as_posix(),
        "bytes": summary.bytes,
        "sha256": summary.sha256,
        "mean_kl": parity.mean_kl,
    }
    return entry, parity


def _measure(
    origin: Origin, file_type: str, base_path: Path, path: Path, asked: Questions, show: Show
) -> FileParity:
    context = max(len(row.input_ids_T) for row in asked.rows)
    backend = LlamaCppBackend(base_path, context=context, adapter=unproven(path))
    advance = show.counter("comparing with base + adapter", len(asked.rows))
    with contextlib.closing(backend):
        return compare_file(origin.backend(), backend, file_type, asked.rows, advance)


@contextlib.contextmanager
def _base_file(run: Run, base: Path) -> Iterator[tuple[str, Path]]:
    """(type, path) of the base as a file in 16 bits: the kind that its own weights are stored in, where they are."""
    from myna.export.gguf import write_gguf

    file_type = "BF16" if str(read_config(base).dtype).endswith("bfloat16") else "F16"
    assert file_type in BOUNDS
    path = run.gguf_dir / f".unproven-base-{file_type}.gguf"
    tokenizer_dir = base if (base / "tokenizer.json").is_file() else run.tokenizer_dir
    try:
        write_gguf(base, tokenizer_dir, path, file_type, name="base")
        yield file_type, path
    finally:
        path.unlink(missing_ok=True)

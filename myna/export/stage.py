"""The stages merge and export: adapter/ → merged/ → gguf/, each shown to be the same as the one before (parity.json)."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from myna.data.render import load_chat_tokenizer
from myna.engine.memory import forget_models
from myna.errors import CheckFailed, UsageError
from myna.export.card import model_card
from myna.export.encoder import GGML_TYPES
from myna.export.gates import Gate
from myna.export.prove import FileProof, Origin, Questions, prove_files, questions, unproven
from myna.export.quantize import QUANT_TYPES, quant_type
from myna.export.weighed import Weighed, weigh
from myna.lock import lock_run
from myna.recipe import Recipe
from myna.run import Run, read_json, write_json, write_text
from myna.show import Show
from myna.stored import (
    held_out,
    is_whole,
    model_dir,
    require_model,
    require_unchanged,
    run_base,
    stored_recipe,
    training_rows,
)


def merge_stage(run: Run, *, show: Show | None = None, again: bool = False) -> dict[str, Any]:
    """Writes merged/ and its part of parity.json; raises CheckFailed where merged is not base + adapter."""
    from myna.export.merge import merge

    show = show or Show()
    run.require_stage("train", "myna train RECIPE --resume")
    recipe = stored_recipe(run)
    with lock_run(run):
        done = run.stage("merge")
        if done and run.merged_dir.is_dir() and not again:
            show.say("merged already")
            return done
        show.stage("merge")
        started = time.perf_counter()
        require_unchanged(run, run.adapter_dir)
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
        run.finish_stage("merge", entry, [run.merged_dir])
    show.say(
        f"merged = base + adapter: max |Δ logit| {merged.max_abs:.1e}, relative {merged.relative:.1e} "
        f"over {merged.num_tokens:,} tokens"
    )
    forget_models()
    return entry


# Types whose own loss is so small that what they lose otherwise shows; the last one is the smallest.
FINE = ("F32", "F16", "BF16", "Q8_0")


def require_types(file_types: Sequence[str], *, importance: bool) -> None:
    """UsageError for a type that Myna does not write, or not without importance: told before anything is made."""
    for file_type in file_types:
        if quant_type(file_type).needs_importance and not importance:
            raise UsageError(
                f"{file_type} needs an importance matrix",
                help="set export.importance: true in the recipe, or export Q2_K, which does without",
            )


def export_stage(
    run: Run, file_types: Sequence[str], *, show: Show | None = None, direct: bool = False
) -> dict[str, Any]:
    """Writes the GGUF files that are not there yet, proves each, and names those that pass.

    With `direct` they are made from base + adapter, and measured against it, without a merged copy. A file that fails
    keeps the name NAME-TYPE.failed.gguf, and CheckFailed is raised after all are measured.
    """
    show = show or Show()
    recipe = stored_recipe(run)
    require_types(file_types, importance=recipe.export.importance)
    with lock_run(run):
        files: dict[str, Any] = dict((run.stage("export") or {}).get("files", {}))
        missing = [t for t in dict.fromkeys(file_types) if not _is_there(run, files.get(t), t, recipe)]
        if not missing:
            show.say("exported already")
            return files
        show.stage("export")
        started = time.perf_counter()
        origin = origin_of(run, recipe, show, direct=direct)
        with _clean(run):
            weighed = (
                weigh(run, recipe, origin, show)
                if any(map(_weighs, missing)) and recipe.export.importance
                else None
            )
            written = {t: _write_file(run, t, origin, weighed if _weighs(t) else None, show) for t in missing}
            proofs = _prove(run, recipe, origin, written, show)
            files |= {t: entry for t, entry in written.items() if not proofs[t].failures}
            _name(run, proofs)
        seconds = (run.stage("export") or {}).get("seconds", 0.0) + time.perf_counter() - started
        run.finish_stage("export", {"seconds": round(seconds, 1), "files": files})
        _enter(run, origin, written, proofs)
        write_text(run.path / "README.md", model_card(run, recipe))
    _raise_failures(run, proofs)
    return files


def origin_of(run: Run, recipe: Recipe, show: Show, *, direct: bool) -> Origin:
    """What a run's files are made from: its merged model, the model it was given, or base + adapter."""
    if direct:
        run.require_stage("train", "myna train RECIPE --resume")
        require_unchanged(run, run.adapter_dir)
        return Origin("base + adapter", run_base(run, show.say).folder, run.adapter_dir)
    require_model(run)
    if is_whole(run):
        return Origin("the model it was made from", model_dir(run))
    require_unchanged(run, run.merged_dir)
    return Origin("merged", model_dir(run), dtype=recipe.export.dtype)


def run_questions(run: Run, recipe: Recipe, context: int | None = None) -> Questions:
    """What a run's files are asked: its held-out rows, training rows after them, and the fixed conversations.

    `context`: tokens that a file is good for, where these are fewer than a row may have.
    """
    assert recipe.data.max_length is not None
    require_unchanged(run, run.tokenizer_dir)
    tokenizer = load_chat_tokenizer(run.tokenizer_dir)
    longest = min(recipe.data.max_length, context or recipe.data.max_length)
    return questions(tokenizer, held_out(run), lambda: training_rows(run, 100), longest)


def file_context(folder: Path) -> int:
    """The context that a file of this model will name."""
    from myna.export.model_keys import context_length, read_model_config

    family, config = read_model_config(folder)
    return context_length(config, family)


def _is_there(run: Run, entry: Mapping[str, Any] | None, file_type: str, recipe: Recipe) -> bool:
    """Whether a type is exported, and as the recipe now has it."""
    if entry is None or not (run.path / entry["path"]).is_file():
        return False
    return bool(entry.get("importance")) == (recipe.export.importance and _weighs(file_type))


def _weighs(file_type: str) -> bool:
    """Whether importance changes a file of this type."""
    return GGML_TYPES[QUANT_TYPES[file_type].main].weighs


@contextlib.contextmanager
def _clean(run: Run) -> Iterator[None]:
    """Nothing unproven stays behind, nor what a process that was killed left."""
    run.gguf_dir.mkdir(parents=True, exist_ok=True)

    def sweep() -> None:
        for pattern in (".unproven-*", ".tmp-*"):
            for path in run.gguf_dir.glob(pattern):
                path.unlink(missing_ok=True)

    sweep()
    try:
        yield
    finally:
        sweep()


def _write_file(
    run: Run, file_type: str, origin: Origin, weighed: Weighed | None, show: Show
) -> dict[str, Any]:
    from myna.export.gguf import write_gguf

    with origin.weights() as weights:
        summary = write_gguf(
            origin.folder,
            run.tokenizer_dir,
            unproven(run.gguf_path(file_type)),
            file_type,
            name=run.name,
            weights=weights,
            importance=weighed.by_tensor if weighed else None,
            keys=weighed.keys if weighed else None,
            progress=lambda done, total: show.progress(f"writing {file_type}", done, total),
        )
    return {
        "path": run.gguf_path(file_type).relative_to(run.path).as_posix(),
        "bytes": summary.bytes,
        "sha256": summary.sha256,
        "types": summary.types,
        "importance": weighed.num_rows if weighed else 0,
    }


def _prove(
    run: Run, recipe: Recipe, origin: Origin, written: Mapping[str, dict[str, Any]], show: Show
) -> dict[str, FileProof]:
    """Proves each file. Where none of them is fine enough to tell a wrong structure from few bits, one is that is."""
    asked = run_questions(run, recipe, file_context(origin.folder))
    paths = {t: unproven(run.gguf_path(t)) for t in written}
    weighed = [t for t, entry in written.items() if entry["importance"]]
    witness = None if any(t in FINE for t in written) else FINE[-1]
    if witness:
        _write_file(run, witness, origin, None, show)
        paths[witness] = unproven(run.gguf_path(witness))
    proofs = prove_files(origin, paths, asked, show, with_importance=weighed)
    forget_models()
    wrong = proofs.pop(witness).failures if witness else []
    for file_type, proof in proofs.items():
        if wrong:
            found = Gate("structure", False, f"{witness}, written in the same way, fails: {wrong[0]}")
            proofs[file_type] = replace(proof, gates=[*proof.gates, found])
        show.say(proofs[file_type].sentence(file_type, origin.name))
    return proofs


def _name(run: Run, proofs: Mapping[str, FileProof]) -> None:
    """A file that passes gets its name, and one that failed before goes; one that fails says so in its name."""
    for file_type, proof in proofs.items():
        path = run.gguf_path(file_type)
        failed = path.with_suffix(".failed.gguf")
        os.replace(unproven(path), failed if proof.failures else path)
        if not proof.failures:
            failed.unlink(missing_ok=True)


def _enter(
    run: Run, origin: Origin, written: Mapping[str, dict[str, Any]], proofs: Mapping[str, FileProof]
) -> None:
    """parity.json: `files` are those that have their name, `failed` those that were last refused one."""
    entries = {
        t: {
            **proof.as_json(),
            "origin": origin.name,
            "types": written[t]["types"],
            "bytes": written[t]["bytes"],
        }
        for t, proof in proofs.items()
    }
    before = read_json(run.parity_path) if run.parity_path.is_file() else {}
    good = {t: entry for t, entry in entries.items() if not proofs[t].failures}
    bad = {t: entry for t, entry in entries.items() if proofs[t].failures}
    gates = [gate for proof in proofs.values() for gate in proof.gates if gate.name == "tokens"]
    update_parity(
        run,
        {
            "verdict": "fail" if bad else "pass",
            "tokens_equal": all(gate.passes for gate in gates),
            "num_tokens": next((p.parity.num_tokens for p in proofs.values() if p.parity), 0),
            "files": before.get("files", {}) | good,
            "failed": {t: e for t, e in before.get("failed", {}).items() if t not in good} | bad,
        },
    )


# What to do where it is more than the distance that is wrong.
CURES = {
    "weights": "export it again; if it stays so, this machine's disk or memory is not sound",
    "loads": "another type may load; `myna chat RUN` through torch works",
}
_OTHERWISE = "llama.cpp runs this tokenizer or template otherwise; `myna chat RUN` through torch works"


def _raise_failures(run: Run, proofs: Mapping[str, FileProof]) -> None:
    failed = {t: proof for t, proof in proofs.items() if proof.failures}
    if not failed:
        return
    gates = [gate.name for proof in failed.values() for gate in proof.gates if not gate.passes]
    cure = CURES.get(gates[0], _OTHERWISE) if gates else "a larger type (Q5_0, Q6_K, Q8_0) is nearer"
    raise CheckFailed(
        "; ".join(f"{t}: {'; '.join(proof.failures)}" for t, proof in failed.items()),
        where=str(run.parity_path),
        help=f"the file is kept as NAME-TYPE.failed.gguf; {cure}",
        code="parity",
    )


def update_parity(run: Run, update: Mapping[str, Any]) -> None:
    """Enters what was measured into parity.json, and its digest into run.json."""
    before = read_json(run.parity_path) if run.parity_path.is_file() else {}
    write_json(run.parity_path, {**before, **update})
    run.record([run.parity_path])

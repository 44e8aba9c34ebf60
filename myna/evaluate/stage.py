"""The stage evaluate: base, tuned and every exported file on the same held-out rows → evaluation.json, report.html."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from myna.backends import Backend
from myna.backends.llama_cpp import LlamaCppBackend
from myna.data.conversation import Conversation
from myna.data.render import ChatTokenizer, load_chat_tokenizer, render_prompt
from myna.engine.memory import forget_models
from myna.errors import RecipeError
from myna.evaluate.answers import answer_rows, answer_tokens, result_of
from myna.evaluate.report import write_report
from myna.export.card import model_card
from myna.lock import lock_run
from myna.model.sources import known_sha256
from myna.recipe import Recipe
from myna.run import Run, file_sha256, read_json, run_files, write_json, write_text
from myna.show import Show
from myna.stored import held_out, is_whole, require_model, require_unchanged, run_base, stored_recipe

PARALLEL_ANSWERS = 8  # prompts that llama.cpp answers at once: 157 tokens/s on two cores, 97 one by one


@dataclass(frozen=True)
class Candidate:
    """Something to evaluate: its name in the table, a digest of what answers, its size, how its backend is opened."""

    name: str
    digest: str
    num_bytes: int
    open: Callable[[], AbstractContextManager[Backend]]


def evaluate_stage(run: Run, *, show: Show | None = None, again: bool = False) -> dict[str, Any]:
    """Answers and scores for everything the run has; results of the same weights and rows are kept unless `again`.

    Returns what it wrote to evaluation.json; empty where no rows are held out.
    """
    show = show or Show()
    require_model(run)
    recipe = stored_recipe(run)
    kept = held_out(run)
    rows = [row for row in kept if not row.is_text][: recipe.evaluate.max_rows]
    if not rows:
        show.say(
            "the held-out rows are plain text: there are no answers to compare"
            if kept
            else "no held-out rows: nothing to evaluate (data.test or data.test_fraction gives some)"
        )
        write_report(run.path)
        return {}
    with lock_run(run):
        started = time.perf_counter()
        tokenizer = load_chat_tokenizer(run.tokenizer_dir)
        max_tokens = recipe.evaluate.max_tokens or answer_tokens(rows, tokenizer)
        before = {} if again else _known_results(run, len(rows), max_tokens)
        results: dict[str, Any] = {}
        for candidate in _candidates(run, recipe, rows, tokenizer, max_tokens, show):
            known = before.get(candidate.name)
            if known and known["digest"] == candidate.digest:
                results[candidate.name] = known
                continue
            show.stage(f"evaluate {candidate.name}")
            results[candidate.name] = _evaluate(candidate, rows, tokenizer, max_tokens, show)
            _write_evaluation(run, rows, max_tokens, results)
        evaluation = _write_evaluation(run, rows, max_tokens, results)
        seconds = (run.stage("evaluate") or {}).get("seconds", 0.0) + time.perf_counter() - started
        run.finish_stage("evaluate", {"seconds": round(seconds, 1), "rows": len(rows)}, [run.evaluation_path])
        write_text(run.path / "README.md", model_card(run, recipe))
        write_report(run.path)
    return evaluation


def _evaluate(
    candidate: Candidate,
    rows: Sequence[Conversation],
    tokenizer: ChatTokenizer,
    max_tokens: int,
    show: Show,
) -> dict[str, Any]:
    forget_models()
    count = show.counter(f"{candidate.name} answers", len(rows))
    with candidate.open() as backend:
        answered = answer_rows(backend, rows, tokenizer, max_tokens, count)
    entry = result_of(answered, rows, num_bytes=candidate.num_bytes)
    return {**entry, "digest": candidate.digest, "answers": list(answered.answers)}


def _candidates(
    run: Run,
    recipe: Recipe,
    rows: Sequence[Conversation],
    tokenizer: ChatTokenizer,
    max_tokens: int,
    show: Show,
) -> Iterator[Candidate]:
    """Base and tuned through torch, then every exported file through llama.cpp, the largest first.

    A whole model that was given is one candidate, "model": nothing was tuned that it could be told from.
    """
    base = run_base(run)
    base_bytes = _weights_bytes(base.folder)
    name = "model" if is_whole(run) else "base"
    yield Candidate(name, base.sha256, base_bytes, lambda: _torch_backend(base.folder, "fp32", name))
    if not is_whole(run):
        require_unchanged(run, run.merged_dir)
        dtype = recipe.export.dtype
        tuned_digest = f"{run.require_stage('train', 'myna train')['adapter_sha256']} {base.sha256} {dtype}"
        merged_bytes = _weights_bytes(run.merged_dir)
        yield Candidate(
            "tuned", tuned_digest, merged_bytes, lambda: _torch_backend(run.merged_dir, dtype, "tuned")
        )
    context = max(len(render_prompt(row.prompt(), tokenizer)) for row in rows) + max_tokens + 8
    for file_type, entry in sorted(run_files(run).items(), key=lambda item: -item[1]["bytes"]):
        if not (run.path / entry["path"]).is_file():
            show.say(f"{file_type} is gone and left out; `myna export {run.path}` writes it again")
            continue
        if known_sha256(run.path / entry["path"]) != entry["sha256"]:
            raise RecipeError(
                f"{entry['path']} is not the file that was exported",
                where=str(run.path),
                help=f"delete it; `myna export {run.path} --quantize {file_type}` writes it again",
                code="changed",
            )
        opened = partial(_file_backend, run.path / entry["path"], context)
        yield Candidate(file_type, entry["sha256"], entry["bytes"], opened)


@contextmanager
def _torch_backend(folder: Path, dtype: str, name: str) -> Iterator[Backend]:
    from myna.backends.torch_backend import TorchBackend
    from myna.model.load import load_base

    yield TorchBackend(load_base(folder, dtype), name)


@contextmanager
def _file_backend(path: Path, context: int) -> Iterator[Backend]:
    backend = LlamaCppBackend(path, context=context, parallel=PARALLEL_ANSWERS)
    try:
        yield backend
    finally:
        backend.close()


def _weights_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _known_results(run: Run, num_rows: int, max_tokens: int) -> dict[str, Any]:
    """Results of an earlier, perhaps interrupted, evaluation over the same rows with the same limits."""
    if not run.evaluation_path.is_file():
        return {}
    found = read_json(run.evaluation_path)
    same = (
        found["rows"] == num_rows
        and found["max_tokens"] == max_tokens
        and found["rows_sha256"] == file_sha256(run.test_path)
    )
    return dict(found["results"]) if same else {}


def _write_evaluation(
    run: Run, rows: Sequence[Conversation], max_tokens: int, results: dict[str, Any]
) -> dict[str, Any]:
    examples = [
        {
            "prompt": row.messages[-2].content,
            "expected": row.answer(),
            **{name: result["answers"][number] for name, result in results.items()},
        }
        for number, row in enumerate(rows[:3])
    ]
    evaluation = {
        "rows": len(rows),
        "rows_sha256": file_sha256(run.test_path),
        "max_tokens": max_tokens,
        "scorer": "exact_match",
        "results": results,
        "examples": examples,
    }
    write_json(run.evaluation_path, evaluation)
    run.record([run.evaluation_path])
    return evaluation

"""`--rows`: the held-out rows of a run that Myna did not train."""

from __future__ import annotations

import json
from pathlib import Path

from myna.data.render import load_chat_tokenizer
from myna.data.rows import as_row, load_conversations
from myna.data.text_rows import refuse_texts
from myna.errors import DataError, UsageError
from myna.lock import lock_run
from myna.model.hub_rows import is_hub, locate_rows
from myna.model.sources import Say
from myna.rendering import short_enough
from myna.run import Run, file_sha256, write_json, write_text
from myna.stored import is_adopted, stored_recipe


def require_rows(run: Run, target: str) -> None:
    """UsageError with the cure where a run that was not trained here has no rows to be measured on."""
    if is_adopted(run) and not run.test_path.is_file():
        raise UsageError(
            f"there are no rows to measure {target} on: Myna did not train it",
            help=f"myna evaluate {target} --rows FILE (.jsonl .json .csv .tsv .parquet)",
        )


def give_rows(run: Run, rows: Path | None, say: Say) -> None:
    """Makes the rows of a file the held-out rows of an adopted run, those that fit into its context.

    Other rows than before take the scores with them. UsageError for a run that was trained here, DataError where no
    row is short enough.
    """
    if rows is None:
        return
    if not is_adopted(run):
        raise UsageError(
            "--rows is for what was not trained here: this run has held-out rows of its own",
            where=str(run.path),
            help=f"myna evaluate {run.path}",
        )
    located = locate_rows(rows, say)
    loaded = load_conversations(located.path)
    for sentence in loaded.said:
        say(sentence)
    refuse_texts(sum(row.is_text for row in loaded.conversations), loaded.num_rows, str(rows))
    recipe = stored_recipe(run)
    kept = short_enough(loaded.conversations, load_chat_tokenizer(run.tokenizer_dir), recipe, say)
    if not kept:
        raise DataError(
            f"every row is longer than {recipe.data.max_length} tokens, which is what the model reads at once",
            where=str(rows),
            help="--rows FILE with shorter rows",
            code="cut",
        )
    with lock_run(run):
        lines = [json.dumps(as_row(row), ensure_ascii=False) + "\n" for row in kept]
        before = file_sha256(run.test_path) if run.test_path.is_file() else None
        write_text(run.test_path, "".join(lines))
        if before != file_sha256(run.test_path):
            _drop_evaluation(run, say)
        info = run.info()
        test = {
            "path": str(rows if is_hub(rows) else rows.resolve()),
            "sha256": loaded.sha256,
            "rows": len(kept),
        }
        commit = {"commit": located.commit} if located.commit else {}
        info["data"]["test"] = {**test, "format": loaded.format_name, **commit}
        info["held_out_rows"] = len(kept)
        info["digests"] |= run.digests([run.test_path])
        write_json(run.path / "run.json", info)


def _drop_evaluation(run: Run, say: Say) -> None:
    """Scores of other rows would stand beside the new ones as if they were theirs."""
    if not run.evaluation_path.is_file():
        return
    info = run.info()
    info["stages"].pop("evaluate", None)
    info["digests"].pop(run.evaluation_path.name, None)
    write_json(run.path / "run.json", info)
    for path in (run.evaluation_path, run.report_path):
        path.unlink(missing_ok=True)
    say("the scores of the rows before are removed: `myna evaluate` measures on these")

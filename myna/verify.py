"""`verify_run`: the story of a run, told from its files. Every digest is taken again, every gate is read back.

A file that changed is a failure, and so is a missing one that the run cannot be without. What may go without harm (the
merged copy, exported files, checkpoints, the rows and the base where they lie) is told as gone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from myna.checkpoint import list_checkpoints, verify_checkpoint
from myna.errors import MynaError
from myna.model.sources import PACKAGED, packaged_gguf_path, resolve_base
from myna.run import Run, file_sha256, read_json, run_files
from myna.stored import pinned_base, stored_recipe

Verdict = Literal["pass", "fail", "gone"]
# Parts of a run that it can be made again without, or that are only larger copies of others.
MAY_GO = ("merged/", "gguf/", "checkpoints/")


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: `part` of the story it belongs to, its name, what was found."""

    part: str
    name: str
    verdict: Verdict
    detail: str

    def as_json(self) -> dict[str, str]:
        return {"part": self.part, "name": self.name, "verdict": self.verdict, "detail": self.detail}


def verify_run(run: Run) -> list[Finding]:
    """All findings, in the order in which a run comes to be."""
    info = run.info()
    return [
        *_inputs(run, info),
        *_recorded(run, info),
        *_checkpoints(run),
        *_files(run),
        *_gates(run),
    ]


def _inputs(run: Run, info: Mapping[str, Any]) -> Iterator[Finding]:
    """The base and the rows, where they were read from."""
    yield _base(pinned_base(run, stored_recipe(run).model.base), info["base"])
    for name, file in info.get("data", {}).items():
        yield _compared(
            "inputs", f"data.{name} {file['path']}", Path(file["path"]), file["sha256"], may_go=True
        )


def _base(spec: str, recorded: Mapping[str, Any]) -> Finding:
    """Only what is on this disk: nothing is fetched to be verified."""
    name = f"base {spec}"
    if spec in PACKAGED and not packaged_gguf_path(spec).is_file():
        return Finding("inputs", name, "gone", "is not in the cache")
    try:
        found = resolve_base(spec, offline=True)
    except MynaError as error:
        return Finding("inputs", name, "gone", error.message)
    if found.sha256 != recorded["sha256"]:
        return Finding("inputs", name, "fail", "its weights are not those the run was trained on")
    return Finding("inputs", name, "pass", found.sha256)


def _recorded(run: Run, info: Mapping[str, Any]) -> Iterator[Finding]:
    """Every file whose digest a stage wrote down, and files that stand where only recorded ones should."""
    recorded = info.get("digests", {})
    for name, sha256 in sorted(recorded.items()):
        yield _compared("run", name, run.path / name, sha256, may_go=name.startswith(MAY_GO))
    for folder in (run.tokenizer_dir, run.adapter_dir, run.merged_dir):
        for file in sorted(folder.glob("*")):
            name = file.relative_to(run.path).as_posix()
            if recorded and name not in recorded:
                yield Finding("run", name, "fail", "no stage wrote it")


def _checkpoints(run: Run) -> Iterator[Finding]:
    for path in list_checkpoints(run.checkpoints_dir):
        fault = verify_checkpoint(path)
        yield Finding("checkpoints", path.name, "fail" if fault else "pass", fault or "whole")


def _files(run: Run) -> Iterator[Finding]:
    for file_type, entry in run_files(run).items():
        path = run.path / entry["path"]
        yield _compared("files", file_type, path, entry["sha256"], may_go=True)


def _gates(run: Run) -> Iterator[Finding]:
    """What was measured when the files were made."""
    if not run.parity_path.is_file():
        return
    parity = read_json(run.parity_path)
    merged = parity.get("merged")
    if merged:
        bound = f"bound {merged['bound']:.0e}"
        detail = f"relative difference {merged['relative']:.1e} ({bound}), largest {merged['max_abs']:.1e}"
        passes = merged["relative"] <= merged["bound"]
        yield Finding("gates", "merged = base + adapter", "pass" if passes else "fail", detail)
    adapter_file = parity.get("adapter_file")
    if adapter_file:
        yield Finding(
            "gates", "adapter file: parity", adapter_file["verdict"], f"mean KL {adapter_file['mean_kl']:.5f}"
        )
    for file_type, entry in parity.get("files", {}).items():
        if file_type not in run_files(run):
            continue
        detail = (
            f"mean KL {entry['mean_kl']:.4f} (bound {entry['bound']}), same top token {entry['same_top']:.1%}"
        )
        yield Finding(
            "gates", f"{file_type}: parity", "pass" if entry["verdict"] == "pass" else "fail", detail
        )
        for name, gate in entry.get("gates", {}).items():
            yield Finding("gates", f"{file_type}: {name}", gate["verdict"], gate["detail"])


def _compared(part: str, name: str, path: Path, sha256: str, *, may_go: bool) -> Finding:
    if not path.is_file():
        return Finding(part, name, "gone" if may_go else "fail", "is gone")
    found = file_sha256(path)
    if found != sha256:
        return Finding(part, name, "fail", f"changed: its SHA-256 is {found[:16]}…, not {sha256[:16]}…")
    return Finding(part, name, "pass", sha256)


def story(run: Run) -> list[tuple[str, str]]:
    """(what, how it went): what a reader wants to know before the findings."""
    info = run.info()
    versions = info["versions"]
    lines = [("made", f"{info['created']} with Myna {versions['myna']}, torch {versions.get('torch', '?')}")]
    recipe = stored_recipe(run)
    adapter, train = recipe.adapter, recipe.train
    stages = info["stages"]
    if "source" in info:
        lines.append(("from", f"{info['source']['kind']} {info['source']['path']}, not trained here"))
    if "train" in stages and "steps" in stages["train"]:
        trained = stages["train"]
        lines.append(
            (
                "trained",
                f"{adapter.method} r {adapter.r} on {info['base']['name']}, {trained['steps']} steps, "
                f"{trained['target_tokens']:,} target tokens, learning rate {train.learning_rate:g}, seed {train.seed}",
            )
        )
    if run.evaluation_path.is_file():
        evaluation = read_json(run.evaluation_path)
        results = ", ".join(f"{n} {r['exact_match']:.0%}" for n, r in evaluation["results"].items())
        lines.append(("scored", f"{results} exact on {evaluation['rows']} held-out rows"))
    return lines

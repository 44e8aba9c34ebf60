"""`verify_run`: the story of a run, told from its files. Every digest is taken again, every gate is read back.

A file that changed or cannot be read is a failure, and so is a missing one that the run cannot be without. What may go
without harm (the merged copy, exported files, checkpoints, the rows and the base where they lie) is told as gone; a
file type that was refused its name, as refused.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from myna.changes import Made, differences, is_accepted, made_from_json
from myna.checkpoint import leftovers, list_checkpoints, read_manifest, step_of, verify_checkpoint
from myna.data.sources import digest_of, is_there
from myna.errors import CheckpointError, MynaError
from myna.model.hub_rows import rows_on_disk
from myna.model.sources import base_on_disk
from myna.plan import read_plan
from myna.run import Run, file_sha256, folder_files, read_json, run_files
from myna.stored import is_recorded_whole, pinned_base, recorded_digests, stored_recipe

Verdict = Literal["pass", "fail", "gone", "refused", "aside"]
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
    """All findings, in the order in which a run comes to be. A file that cannot be read is one of them."""
    return [finding for part in PARTS for finding in _looked_at(part, run)]


# What a file that is spoiled raises where it is read: it is told, not passed on.
SPOILED = (MynaError, KeyError, TypeError, ValueError, AttributeError)


def _looked_at(part: Part, run: Run) -> list[Finding]:
    found: list[Finding] = []
    try:
        found.extend(part.look(run))
    except SPOILED as error:
        found.append(Finding(part.name, part.file, "fail", _spoiled(error)))
    return found


def _spoiled(error: Exception) -> str:
    if isinstance(error, MynaError):
        return error.message
    return f"is not what Myna writes: {type(error).__name__} {error}"


def _base(run: Run) -> Iterator[Finding]:
    """Only what is on this disk: nothing is fetched or unpacked to be verified."""
    spec = pinned_base(run, stored_recipe(run).model.base)
    name = f"base {spec}"
    try:
        found = base_on_disk(spec)
    except MynaError as error:
        yield Finding("inputs", name, "fail", f"{error.where}: {error.message}")
        return
    if found is None:
        yield Finding("inputs", name, "gone", "is not on this disk")
        return
    other = found.differs_from(run.info()["base"])
    if other:
        yield Finding("inputs", name, "fail", f"{other} are not those the run was trained on")
    else:
        yield Finding("inputs", name, "pass", found.sha256)


def _rows(run: Run) -> Iterator[Finding]:
    """The rows where they were read from."""
    for name, file in run.info().get("data", {}).items():
        told = f"data.{name} {file['path']}"
        located = rows_on_disk(file["path"], file)
        if located is None:
            yield Finding("inputs", told, "gone", f"commit {file['commit']} is not on this disk")
            continue
        path = located.path
        if is_there(path) and not path.is_file():
            same = digest_of(path) == file["sha256"]
            yield Finding(
                "inputs", told, "pass" if same else "fail", "as read" if same else "one of its files changed"
            )
        else:
            yield _compared("inputs", told, path, file["sha256"], may_go=True)


def _recorded(run: Run) -> Iterator[Finding]:
    """Every file whose digest a stage wrote down, and files that stand where only recorded ones should."""
    folders = [folder for folder in (run.tokenizer_dir, run.adapter_dir, run.merged_dir) if folder.is_dir()]
    before = [folder.name for folder in folders if not is_recorded_whole(run, folder.name)]
    recorded = recorded_digests(run, run.adapter_dir.name) | run.info().get("digests", {})
    for name, sha256 in sorted(recorded.items()):
        yield _compared("run", name, run.path / name, sha256, may_go=name.startswith(MAY_GO))
    for folder in folders:
        for file in folder_files(folder):
            name = file.relative_to(run.path).as_posix()
            if folder.name not in before and name not in recorded:
                yield Finding("run", name, "fail", "no stage wrote it")
    if before:
        detail = f"the run was made before digests were kept: {', '.join(before)} cannot be compared"
        yield Finding("run", "digests", "gone", detail)


def _checkpoints(run: Run) -> Iterator[Finding]:
    """Whether each is whole and of this run. What was set aside or left by a kill is listed, and no failure."""
    for path in list_checkpoints(run.checkpoints_dir):
        try:
            fault = verify_checkpoint(path) or _of_something_else(run, path)
        except CheckpointError as error:
            fault = error.message
        yield Finding("checkpoints", path.name, "fail" if fault else "pass", fault or "whole")
    for path in leftovers(run.checkpoints_dir):
        damaged = path.suffix == ".damaged"
        detail = (
            "damaged, set aside by a resume" if damaged else "left by a kill; the next --resume removes it"
        )
        yield Finding("checkpoints", path.name, "aside", detail)


def _of_something_else(run: Run, checkpoint: Path) -> str | None:
    manifest = read_manifest(checkpoint)
    if "plan" not in manifest or is_accepted(run, step_of(checkpoint)):
        return None
    try:
        info, plan = run.info(), asdict(read_plan(run.plan_path))
        here = Made(stored_recipe(run).model_dump(mode="json"), info["base"], info["data"], plan)
    except SPOILED:  # the part that looks at these files tells it
        return None
    changed = differences(made_from_json(manifest), here)
    return f"was made from something else: {'; '.join(changed)}" if changed else None


def _files(run: Run) -> Iterator[Finding]:
    for file_type, entry in run_files(run).items():
        path = run.path / entry["path"]
        yield _compared("files", file_type, path, entry["sha256"], may_go=True)


def _gates(run: Run) -> Iterator[Finding]:
    """What was measured when the files were made."""
    if not run.parity_path.is_file():
        return
    parity = read_json(run.parity_path)
    if parity.get("merged"):
        yield _merged(parity["merged"])
    if parity.get("adapter_file"):
        entry = parity["adapter_file"]
        exported = run.stage("export_adapter")
        has_name = exported is not None and (run.path / exported["path"]).is_file()
        verdict = _verdict(entry, has_name=has_name)
        yield Finding("gates", "adapter file: parity", verdict, f"mean KL {entry['mean_kl']:.5f}")
    files = parity.get("files", {})
    for file_type in run_files(run):
        if file_type in files:
            yield from _gates_of(file_type, files[file_type])
    # older runs kept what failed beside what passed
    failed = {t: e for t, e in files.items() if t not in run_files(run)} | parity.get("failed", {})
    for file_type, entry in failed.items():
        yield Finding("gates", f"{file_type}: not exported", "refused", _failures(entry))


def _merged(merged: Mapping[str, Any]) -> Finding:
    bound = f"bound {merged['bound']:.0e}"
    detail = f"relative difference {merged['relative']:.1e} ({bound}), largest {merged['max_abs']:.1e}"
    passes = merged["relative"] <= merged["bound"]
    return Finding("gates", "merged = base + adapter", "pass" if passes else "fail", detail)


def _gates_of(file_type: str, entry: Mapping[str, Any]) -> Iterator[Finding]:
    detail = (
        f"mean KL {entry['mean_kl']:.4f} (bound {entry['bound']}), same top token {entry['same_top']:.1%}"
    )
    yield Finding("gates", f"{file_type}: parity", _verdict(entry), detail)
    for name, gate in entry.get("gates", {}).items():
        yield Finding("gates", f"{file_type}: {name}", _verdict(gate), gate["detail"])


def _verdict(entry: Mapping[str, Any], *, has_name: bool = True) -> Verdict:
    """A file that failed and was given no name fails nothing: it is not one of the run's."""
    if entry["verdict"] == "pass":
        return "pass"
    return "fail" if has_name else "refused"


def _failures(entry: Mapping[str, Any]) -> str:
    """Why a file was given no name: the gates that it failed, or its distance."""
    gates = entry.get("gates", {})
    reasons = [f"{n}: {gate['detail']}" for n, gate in gates.items() if gate["verdict"] != "pass"]
    if "mean_kl" in entry:
        reasons.append(f"mean KL {entry['mean_kl']:.4f} (bound {entry.get('bound')})")
    return "; ".join(reasons) or "it failed its gates"


def _evaluation(run: Run) -> Iterator[Finding]:
    """Whether the scores are of the rows that are held out now."""
    if not run.evaluation_path.is_file():
        return
    evaluation = read_json(run.evaluation_path)
    name = run.test_path.relative_to(run.path).as_posix()
    held_out = run.info().get("digests", {}).get(name)  # that the file is still this one is looked at before
    if held_out is None and run.test_path.is_file():
        held_out = file_sha256(run.test_path)
    of_rows = evaluation["rows_sha256"] == held_out
    names = ", ".join(evaluation["results"])
    yield (
        Finding("scores", "rows", "pass", f"{names}: on the held-out rows")
        if of_rows
        else Finding("scores", "evaluation.json", "fail", "evaluation.json is of other rows")
    )


@dataclass(frozen=True)
class Part:
    """A part of the story: its name, the file it is read from, and what looks at it."""

    name: str
    file: str
    look: Callable[[Run], Iterator[Finding]]


PARTS = (
    Part("inputs", "recipe.yaml", _base),
    Part("inputs", "run.json", _rows),
    Part("run", "run.json", _recorded),
    Part("checkpoints", "checkpoints", _checkpoints),
    Part("files", "run.json", _files),
    Part("gates", "parity.json", _gates),
    Part("scores", "evaluation.json", _evaluation),
)


def _compared(part: str, name: str, path: Path, sha256: str, *, may_go: bool) -> Finding:
    if not path.is_file():
        return Finding(part, name, "gone" if may_go else "fail", "is gone")
    found = file_sha256(path)
    if found != sha256:
        return Finding(part, name, "fail", f"changed: its SHA-256 is {found[:16]}…, not {sha256[:16]}…")
    return Finding(part, name, "pass", sha256)


def story(run: Run) -> list[tuple[str, str]]:
    """(what, how it went): what a reader wants to know before the findings; they say what could not be read."""
    lines = []
    for what, tell in TOLD.items():
        with contextlib.suppress(*SPOILED):
            how = tell(run)
            if how:
                lines.append((what, how))
    return lines


def _made(run: Run) -> str:
    info = run.info()
    versions = info["versions"]
    return f"{info['created']} with Myna {versions['myna']}, torch {versions.get('torch', '?')}"


def _from(run: Run) -> str | None:
    source = run.info().get("source")
    return f"{source['kind']} {source['path']}, not trained here" if source else None


def _trained(run: Run) -> str | None:
    trained = run.stage("train")
    if not trained or "steps" not in trained:
        return None
    recipe = stored_recipe(run)
    adapter, train = recipe.adapter, recipe.train
    return (
        f"{adapter.method} r {adapter.r} on {run.info()['base']['name']}, {trained['steps']} steps, "
        f"{trained['target_tokens']:,} target tokens, learning rate {train.learning_rate:g}, seed {train.seed}"
    )


def _scored(run: Run) -> str | None:
    if not run.evaluation_path.is_file():
        return None
    evaluation = read_json(run.evaluation_path)
    results = ", ".join(f"{n} {r['exact_match']:.0%}" for n, r in evaluation["results"].items())
    return f"{results} exact on {evaluation['rows']} held-out rows"


TOLD: Mapping[str, Callable[[Run], str | None]] = {
    "made": _made,
    "from": _from,
    "trained": _trained,
    "scored": _scored,
}

"""Shows all that docs/reliability.md promises, in full: the long form of tests/test_survival.py, with its figures.

    python scripts/reliability.py [--only PART,PART] [--seed 0] [--out FOLDER] [--again]

Parts: exactness (40 cuts), kills (200), failpoints (every call of a save), damage, disk, signals (20), cost (what saving and
restarting take on the packaged model), goodput (15 minutes, killed every 90 s). A part that is done is kept in
FOLDER/reliability.json and not done again, so that a script that was stopped goes on. Exit code 1 where something broke.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]

import tiny  # noqa: E402
from _machine import RESULTS_DIR, commit, load_average, machine, say, today  # noqa: E402
from survival import full_disk, proofs  # noqa: E402
from survival.nursery import nursery  # noqa: E402
from survival.runs import kinds  # noqa: E402

from myna.checkpoint import list_checkpoints  # noqa: E402
from myna.metrics import read_lines  # noqa: E402
from myna.run import Run, write_json, write_text  # noqa: E402

CUTS, KILLS, SIGNALS = 40, 200, 20
GOODPUT_MINUTES, KILL_EVERY = 15, 90  # minutes, seconds
RESTARTS, SAVES = 5, 9

PROMISES = {
    "exactness": "cut at random steps, by kill and by signal: adapter, state and metrics equal bit for bit",
    "kills": "SIGKILL at random moments and phases: goes on without a hand, ends with the same bytes",
    "failpoints": "each write, sync and rename of a save fails once and is the last once: it or the one before is used",
    "damage": "each file × {truncated, zeroed, emptied, missing, a bit flipped, swapped, a folder}: the one before used",
    "disk": "a full tmpfs in train, merge and export: exit 4, nothing half under a final name, room is enough to go on",
    "signals": "INT, TERM and HUP at random moments: right exit code, within a step and two seconds, the same end",
    "cost": "what a save takes of the time between two, and a restart until its first step",
    "goodput": f"killed every {KILL_EVERY} s for {GOODPUT_MINUTES} minutes: useful steps over ideal ones",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default=",".join(PROMISES), help="parts, with commas between")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS_DIR, help="where the results are kept")
    parser.add_argument("--again", action="store_true", help="do parts again that are done")
    arguments = parser.parse_args()
    kept_path = arguments.out / f"{today()}-reliability.json"
    kept: dict[str, Any] = json.loads(kept_path.read_text()) if kept_path.is_file() else {}
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    broken = []
    for part in arguments.only.split(","):
        if part not in kept or arguments.again:
            say(f"{part}: {PROMISES[part]}")
            before, started = load_average(), time.monotonic()
            with tempfile.TemporaryDirectory() as folder:
                found = PARTS[part](Path(folder), arguments.seed)
            told = {"seconds": round(time.monotonic() - started), "load_before": before, "commit": commit()}
            kept[part] = found | told
            write_json(kept_path, {"machine": machine(), **kept})
        broken += [f"{part}: {fault}" for fault in kept[part].get("broken", [])]
        say(f"{part}: {figure(part, kept[part])}")
    write_text(kept_path.with_suffix(".md"), page(kept))
    say("\n".join(broken) or "nothing broke")
    raise SystemExit(bool(broken))


def proven(do: Callable[..., proofs.Shown]) -> Callable[[Path, int], dict[str, Any]]:
    """A proof as a part, with a nursery and a tiny base of its own."""

    def part(folder: Path, seed: int) -> dict[str, Any]:
        base = tiny.write_base(folder / "base")
        with nursery() as forks:
            return do(forks, folder, base, seed).as_json()

    return part


def _exactness(forks: Any, folder: Path, base: Path, seed: int) -> proofs.Shown:
    """Every kind at least once, with the kernels that a run here would have."""
    several = kinds()
    cuts = -(-CUTS // len(several))
    shown = proofs.exactness(forks, folder, base, several, cuts=cuts, seed=seed, environment={})
    assert shown.tried >= CUTS
    return shown


def _disk(forks: Any, folder: Path, base: Path, _: int) -> proofs.Shown:
    try:
        return full_disk.full_disk(forks, folder, base)
    except full_disk.NoMount as error:
        return proofs.Shown(broken=[f"no tmpfs can be mounted here: {error}"])


# On the packaged model


def _recipe(folder: Path, **train: Any) -> Path:
    from myna.demo import write_rows

    train_path, test_path = write_rows(folder / "rows")
    data = {"train": str(train_path), "test": str(test_path)}
    path = folder / "recipe.yaml"
    path.write_text(json.dumps({"data": data, "run": {"name": str(folder / "run")}, "train": train}))
    return path


def _begin(recipe: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "myna", "train", str(recipe), "--resume"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, cwd=recipe.parent, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def cost(folder: Path, _: int) -> dict[str, Any]:
    """Seconds of a save and of a step, and from `myna train --resume` to where its first step begins."""
    from myna.checkpoint import read_manifest, read_snapshot, save_checkpoint

    recipe = _recipe(folder, epochs=9, save_every_steps=2)
    run, restarts = Run(folder / "run"), []
    for number in range(RESTARTS + 1):
        started, done = time.monotonic(), len(read_lines(run.metrics_path))
        with _begin(recipe) as process:
            while len(read_lines(run.metrics_path)) <= done and process.poll() is None:
                time.sleep(0.02)
            first = time.monotonic() - started - read_lines(run.metrics_path)[-1]["seconds"]
            while (
                list_checkpoints(run.checkpoints_dir)[-1:] == []
                or len(read_lines(run.metrics_path)) < done + 3
            ):
                time.sleep(0.02)
            process.kill()
        if number:  # the first one fetches, unpacks and compiles
            restarts.append(first)
    lines = read_lines(run.metrics_path)
    path = list_checkpoints(run.checkpoints_dir)[-1]
    snapshot, manifest = read_snapshot(path), read_manifest(path)
    made_from = {key: manifest[key] for key in ("run", "recipe", "plan", "base", "data", "versions")}
    seconds = []
    for _ in range(SAVES):
        started = time.monotonic()
        save_checkpoint(folder / "saved", snapshot, made_from)
        seconds.append(time.monotonic() - started)
    step = statistics.median(line["seconds"] for line in lines)
    return {
        "save_seconds": round(statistics.median(seconds), 3),
        "megabytes": round(sum(file.stat().st_size for file in path.iterdir()) / 1e6, 1),
        "step_seconds": round(step, 3),
        "share": round(statistics.median(seconds) / (25 * step), 4),
        "restart_seconds": [round(one, 1) for one in restarts],
    }


def goodput(folder: Path, _: int) -> dict[str, Any]:
    """Steps that a run has at the end, killed again and again, over those of the same time without an end."""
    recipe, run = _recipe(folder, epochs=1000, save_every_steps=5), Run(folder / "run")
    with _begin(recipe) as process:  # what is fetched, unpacked and compiled once does not count
        while len(list_checkpoints(run.checkpoints_dir)) == 0 and process.poll() is None:
            time.sleep(0.1)
        process.kill()
    first = len(read_lines(run.metrics_path))
    begun, ends, kills = time.monotonic(), time.monotonic() + 60 * GOODPUT_MINUTES, 0
    while (left := ends - time.monotonic()) > 1:
        with _begin(recipe) as process:
            try:
                process.communicate(timeout=min(KILL_EVERY, left))
                return {"broken": [f"ended by itself with exit {process.returncode}"]}
            except subprocess.TimeoutExpired:
                process.kill()
                kills += 1
    seconds = time.monotonic() - begun
    lines = read_lines(run.metrics_path)
    useful = int(list_checkpoints(run.checkpoints_dir)[-1].name[5:]) - first
    ideal = seconds / statistics.median(line["seconds"] for line in lines)
    share = round(useful / ideal, 3)
    return {"kills": kills, "useful": useful, "ideal": round(ideal), "share": share, "broken": []}


PARTS: dict[str, Callable[[Path, int], dict[str, Any]]] = {
    "exactness": proven(_exactness),
    "kills": proven(
        lambda forks, folder, base, seed: proofs.kills(forks, folder, base, times=KILLS, seed=seed)
    ),
    "failpoints": proven(lambda forks, folder, base, _: proofs.failpoints(forks, folder, base)),
    "damage": proven(lambda forks, folder, base, seed: proofs.damage(forks, folder, base, seed=seed)),
    "disk": proven(_disk),
    "signals": proven(
        lambda forks, folder, base, seed: proofs.signals(forks, folder, base, times=SIGNALS, seed=seed)
    ),
    "cost": cost,
    "goodput": goodput,
}


def figure(part: str, found: dict[str, Any]) -> str:
    """What a part came to, in a few words."""
    if part == "cost":
        least, most = min(found["restart_seconds"]), max(found["restart_seconds"])
        return (
            f"{found['save_seconds']} s a save of {found['megabytes']} MB, {found['share']:.1%} of 25 steps of "
            f"{found['step_seconds']} s; restarted in {least} to {most} s"
        )
    if part == "goodput":
        return f"{found['share']:.0%} ({found['useful']} of {found['ideal']} steps, {found['kills']} kills)"
    seen = ", ".join(f"{name} {count}" for name, count in found["seen"].items())
    return f"{found['held']} of {found['tried']}" + (f" ({seen})" if seen else "")


def page(kept: dict[str, Any]) -> str:
    """A page of results."""
    lines = [
        "# Reliability",
        "",
        f"{today()} · {machine()}",
        "",
        "| shown | figure | seconds | load before | commit |",
    ]
    lines.append("| --- | --- | --- | --- | --- |")
    for part, found in kept.items():
        if part in PROMISES:
            told = (
                PROMISES[part],
                figure(part, found),
                found["seconds"],
                found["load_before"],
                found["commit"],
            )
            lines.append("| " + " | ".join(map(str, told)) + " |")
    return "\n".join([*lines, "", "`python scripts/reliability.py`", ""])


if __name__ == "__main__":
    main()

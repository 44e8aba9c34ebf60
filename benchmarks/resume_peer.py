"""The same kills, the same damage and the same full disk for Myna and for TRL with PEFT, side by side.

    python benchmarks/resume_peer.py --peer-python PYTHON [--kills 20] [--seed 0] [--out FOLDER]

PYTHON is the interpreter of an environment that has trl, peft and datasets. Both train a tiny model, save at every step and
keep three. The peer is resumed as its documentation says (`get_last_checkpoint`); where that fails, a hand removes the
newest checkpoint, which is counted.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import tiny  # noqa: E402
from _machine import RESULTS_DIR, commit, load_average, machine, say, today, versions  # noqa: E402
from survival import full_disk, proofs  # noqa: E402
from survival.nursery import nursery  # noqa: E402

from myna.run import write_json, write_text  # noqa: E402

STEPS = 12
FILES = ("adapter_model.safetensors", "optimizer.pt", "trainer_state.json", "rng_state.pth")
MOST_HANDS = 20  # for one run


class Peer:
    """TRL in lives that can be ended."""

    def __init__(self, python: Path, folder: Path, base: Path) -> None:
        self.folder, self.base = folder, base
        self.rows = tiny.write_rows(folder / "rows.jsonl", tiny.rows(40))
        self._process = subprocess.Popen(
            [str(python), str(Path(__file__).with_name("_resume_child.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"},
        )

    def run(self, output: Path, **how: Any) -> dict[str, Any]:
        """One life."""
        job = {"output": str(output), "model": str(self.base), "rows": str(self.rows), "steps": STEPS, **how}
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        found: dict[str, Any] = json.loads(self._process.stdout.readline())
        return found

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(timeout=60)


@contextmanager
def peer_of(python: Path, folder: Path, base: Path) -> Iterator[Peer]:
    peer = Peer(python, folder, base)
    try:
        yield peer
    finally:
        peer.close()


def checkpoints(output: Path) -> list[Path]:
    found = [path for path in output.glob("checkpoint-*") if path.is_dir()]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def digest(output: Path) -> str:
    return hashlib.sha256((output / "final/adapter_model.safetensors").read_bytes()).hexdigest()


def peer_kills(peer: Peer, expected: str, *, times: int, seed: int) -> dict[str, int]:
    """As proofs.kills: half at any moment of a life, half soon after a save has begun."""
    draw, seen = random.Random(seed), {"kills": 0, "in_save": 0, "hands": 0, "runs": 0, "other_bytes": 0}
    while seen["kills"] < times:
        seen["runs"] += 1
        output, hands = peer.folder / f"killed-{seen['runs']}", 0
        while True:
            how: dict[str, Any] = {}
            if seen["kills"] < times:
                how = {"kill_after": draw.uniform(0.0, 3.0)}
                if draw.random() < 0.5:
                    how = {"in_save": True, "kill_after": draw.uniform(0.0, 0.05)}
            life = peer.run(output, **how)
            if life["code"] == 0:
                seen["other_bytes"] += digest(output) != expected
                break
            if life["code"] == -9:
                seen["kills"] += 1
                seen["in_save"] += life["saving"]
                continue
            hands += 1
            say(f"a hand is needed: {life['said'].strip().splitlines()[-1]}")
            if hands > MOST_HANDS or not checkpoints(output):
                break
            shutil.rmtree(checkpoints(output)[-1])
        seen["hands"] += hands
    return seen


def stop_with(peer: Peer, output: Path, num_checkpoints: int) -> None:
    """A run that was stopped and has so many checkpoints or more, each of them whole."""
    while len(checkpoints(output)) < num_checkpoints:
        life = peer.run(output, in_save=True, kill_after=0.6)
        assert life["code"] == -9, life["said"]
        for path in checkpoints(output):
            if not (path / "trainer_state.json").is_file():  # it is written last
                shutil.rmtree(path)


def peer_damage(peer: Peer, expected: str, *, seed: int) -> dict[str, int]:
    """Each of four files in each of five ways, in the newest of three checkpoints."""
    draw = random.Random(seed)
    stopped = peer.folder / "stopped"
    stop_with(peer, stopped, 3)
    newest = int(checkpoints(stopped)[-1].name.rpartition("-")[2])
    other = checkpoints(stopped)[-2].name
    seen = {"tried": 0, "silent": 0, "harmless": 0, "refused": 0, "fell_back": 0}
    ways: dict[str, Callable[[Path, random.Random], None]] = {
        **proofs.DAMAGES,
        "swapped with another checkpoint's": lambda path, _: (
            shutil.copyfile(path.parent.with_name(other) / path.name, path) and None
        ),
    }
    for name in FILES:
        for harm, do in ways.items():
            output = peer.folder / "damaged"
            shutil.rmtree(output, ignore_errors=True)
            shutil.copytree(stopped, output)
            do(output / f"checkpoint-{newest}" / name, draw)
            life = peer.run(output)
            seen["tried"] += 1
            if life["code"]:
                seen["refused"] += 1
            elif f"checkpoint-{newest}" not in life["said"].split("resumes from")[-1].split("\n")[0]:
                seen["fell_back"] += 1
            elif digest(output) == expected:
                seen["harmless"] += 1
            else:
                seen["silent"] += 1
                say(f"silent: {name} {harm}")
    return seen


def peer_disk(peer: Peer, expected: str) -> dict[str, Any]:
    """On a tmpfs that is full: how it ends, and whether it goes on when there is room."""
    with full_disk.small_disk(peer.folder / "disk") as disk:
        output = disk / "run"
        stop_with(peer, output, 1)
        with full_disk.filled(disk):
            full = peer.run(output)
        say(f"on a full disk: {full['said'].strip().splitlines()[-1]}")
        after = peer.run(output)
        say(f"with room: {after['said'].strip().splitlines()[-1]}")
        same = after["code"] == 0 and digest(output) == expected
        return {
            "goes_on_while_full": full["code"] == 0,
            "goes_on_with_room": after["code"] == 0,
            "same_bytes": same,
        }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer-python", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS_DIR)
    arguments = parser.parse_args()
    before = load_average()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = tiny.write_base(folder / "base")
        with nursery() as forks:
            say("Myna: kills")
            aim = {
                "times": arguments.kills,
                "seed": arguments.seed,
                "phases": ["saving"],
            }  # as the peer's are
            kills = proofs.kills(forks, folder, base, **aim).as_json()
            say("Myna: damage")
            damage = proofs.damage(forks, folder, base, seed=arguments.seed, more=False).as_json()
            say("Myna: a full disk")
            disk = full_disk.full_disk(forks, folder, base, stages=False).as_json()
        (folder / "peer").mkdir()
        with peer_of(arguments.peer_python, folder / "peer", base) as peer:
            say("TRL: undisturbed")
            life = peer.run(folder / "peer/straight")
            assert life["code"] == 0, life["said"]
            expected = digest(folder / "peer/straight")
            say("TRL: kills")
            their_kills = peer_kills(peer, expected, times=arguments.kills, seed=arguments.seed)
            say(f"{their_kills}\nTRL: damage")
            their_damage = peer_damage(peer, expected, seed=arguments.seed)
            say(f"{their_damage}\nTRL: a full disk")
            their_disk = peer_disk(peer, expected)
            say(str(their_disk))
    found = {
        "machine": machine(),
        "commit": commit(),
        "load_before": before,
        "versions": {"myna": versions(sys.executable), "peer": versions(arguments.peer_python)},
        "myna": {"kills": kills, "damage": damage, "disk": disk},
        "peer": {"kills": their_kills, "damage": their_damage, "disk": their_disk},
    }
    path = arguments.out / f"{today()}-resume-peer.json"
    write_json(path, found)
    write_text(path.with_suffix(".md"), page(found, arguments.kills))


def page(found: dict[str, Any], kills: int) -> str:
    """The two columns. Of Myna whatever broke is counted as what a hand is needed for."""
    ours, theirs = found["myna"], found["peer"]
    killed, damaged, full = theirs["kills"], theirs["damage"], theirs["disk"]
    tried, held = ours["damage"]["tried"], ours["damage"]["held"]

    def yes(holds: object) -> str:
        return "yes" if holds else "no"

    rows = (
        ("a hand was needed after a kill", len(ours["kills"]["broken"]), killed["hands"]),
        (
            "killed runs whose adapter is not the undisturbed one's",
            len(ours["kills"]["broken"]),
            killed["other_bytes"],
        ),
        ("damaged, and used in silence", tried - held, damaged["silent"]),
        ("damaged, and used without harm", 0, damaged["harmless"]),
        ("damaged, and an error that needs a hand", 0, damaged["refused"]),
        ("damaged, said, and the one before used", held, damaged["fell_back"]),
        ("training goes on while the disk is full", "until the third save", yes(full["goes_on_while_full"])),
        (
            "goes on by itself when there is room",
            yes(not ours["disk"]["broken"]),
            yes(full["goes_on_with_room"]),
        ),
        ("and ends with the undisturbed adapter", yes(not ours["disk"]["broken"]), yes(full["same_bytes"])),
    )
    in_save = ours["kills"]["seen"].get("in saving", 0)
    command = f"python benchmarks/resume_peer.py --peer-python PYTHON --kills {kills} --seed {found['seed']}"
    lines = [
        "# Resuming, beside TRL",
        "",
        f"{today()} · {found['machine']} · commit {found['commit']} · load before: {found['load_before']}",
        "",
        f"`{command}`: {kills} SIGKILLs each, {in_save}",
        f"of ours and {killed['in_save']} of the peer's inside a save; {tried} and {damaged['tried']} damaged checkpoints;",
        f"a full tmpfs. Saved at every step, three kept. Versions: {found['versions']}.",
        "",
        "| | Myna | TRL + PEFT |",
        "| --- | --- | --- |",
        *(f"| {name} | {mine} | {other} |" for name, mine, other in rows),
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()

"""The packaged model, the whole way by the command line: rows → train → kill → resume → merge → GGUF → evaluate → chat.

The demo with fewer steps and rows; every number that is promised is looked at, and who was talked to over the network.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent.parent

# Loaded by every Python process of the journey: writes down every address that a socket is connected to.
WATCH = """
import os, socket, sys
def watched(connect):
    def call(self, address, *rest):
        if self.family != getattr(socket, "AF_UNIX", None):
            with open(os.environ["CONNECTIONS"], "a") as log:
                log.write(f"{' '.join(sys.orig_argv)}\\t{address}\\n")
        return connect(self, address, *rest)
    return call
class Watched(socket.socket):
    connect = watched(socket.socket.connect)
    connect_ex = watched(socket.socket.connect_ex)
socket.socket = Watched
"""

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("journey")
    (folder / "sitecustomize.py").write_text(WATCH)
    return folder


@pytest.fixture(scope="module")
def environment(folder: Path) -> dict[str, str]:
    path = os.pathsep.join([str(folder), str(ROOT)])
    return {**os.environ, "PYTHONPATH": path, "CONNECTIONS": str(folder / "connections")}


@pytest.fixture(scope="module")
def myna(folder: Path, environment: dict[str, str]) -> Run:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "myna.cli", *arguments]
        return subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900, check=False
        )

    return run


SHORT = ("--set", "train.max_rows=160", "--set", "evaluate.max_rows=24", "--set", "train.save_every_steps=4")


@pytest.fixture(scope="module")
def outcome(folder: Path, environment: dict[str, str], myna: Run) -> dict[str, Any]:
    """The demo, killed once on the way and started again."""
    command = [sys.executable, "-m", "myna.cli", "demo", *SHORT]
    with subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 300
        while not (folder / "runs/demo/checkpoints/step-000004").is_dir():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = myna("demo", *SHORT, "--json")
    assert done.returncode == 0, done.stderr
    assert "going on after step" in done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def test_it_learned_and_the_files_are_the_model(outcome: dict[str, Any], folder: Path) -> None:
    evaluation, parity = outcome["evaluation"], outcome["parity"]
    assert list(evaluation) == ["base", "tuned", "Q8_0", "Q4_K_M"]
    # 20 of the demo's 50 steps: not yet what the demo promises, but far from the base
    assert evaluation["base"]["exact_match"] == 0.0
    assert evaluation["tuned"]["exact_match"] >= 0.5
    assert evaluation["tuned"]["field_f1"] >= 0.8
    assert parity["verdict"] == "pass"
    assert parity["merged"]["relative"] <= 1e-5 and parity["merged"]["num_tokens"] >= 1000
    assert parity["Q8_0"]["mean_kl"] <= 0.01 and parity["Q4_K_M"]["mean_kl"] <= 0.2
    lines = [
        json.loads(line)["step"] for line in (folder / "runs/demo/metrics.jsonl").read_text().splitlines()
    ]
    assert lines == list(range(1, 21))


def test_the_finished_demo_says_so(outcome: dict[str, Any], myna: Run) -> None:
    done = myna("demo", *SHORT)
    assert done.returncode == 0
    assert "Q4_K_M" in done.stdout and "To start afresh" in done.stdout
    assert "step 1/20" not in done.stderr


def test_it_chats_through_the_run_and_through_the_file(outcome: dict[str, Any], myna: Run) -> None:
    order = "Hi, Anna Berg here. Please send 12 desk lamps to Oslo on Friday."
    for target in ("demo", outcome["files"]["Q4_K_M"]):
        done = myna("chat", target, "--once", order, "--temperature", "0", "--json")
        answer = json.loads(json.loads(done.stdout)["text"])
        assert (answer["customer"], answer["quantity"]) == ("Anna Berg", 12)


def test_the_file_holds_what_upstreams_rules_say(outcome: dict[str, Any], folder: Path) -> None:
    types = json.loads((folder / "runs/demo/parity.json").read_text())["files"]["Q4_K_M"]["types"]
    assert types == {"F32": 61, "Q4_K": 16, "Q5_0": 166, "Q6_K": 14, "Q8_0": 15}


def test_nothing_but_the_package_index_was_talked_to(outcome: dict[str, Any], folder: Path) -> None:
    log = folder / "connections"
    lines = log.read_text().splitlines() if log.is_file() else []
    assert [line for line in lines if "-m pip download" not in line.split("\t")[0]] == []


def test_the_watch_sees_a_connection(folder: Path, environment: dict[str, str]) -> None:
    log = folder / "seen"
    code = "import socket; socket.socket().connect_ex(('127.0.0.1', 9))"
    subprocess.run([sys.executable, "-c", code], env={**environment, "CONNECTIONS": str(log)}, check=True)
    assert "127.0.0.1" in log.read_text()

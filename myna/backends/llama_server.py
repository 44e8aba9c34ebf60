"""llama.cpp's server as a child process: on a unix socket (a local port where there are none), with a secret key."""

from __future__ import annotations

import contextlib
import http.client
import json
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from myna.errors import MachineError, ModelError

START_SECONDS = 120
LONGEST_SOCKET_FOLDER = 90  # the path of a unix socket has at most 107 bytes


class _SocketConnection(http.client.HTTPConnection):
    """HTTP over a unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost")
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.connect(self._path)


@dataclass(frozen=True)
class Child:
    """A running llama.cpp server; `folder` holds its socket and its log."""

    process: subprocess.Popen[str]
    address: str
    key: str
    folder: Path

    def connect(self) -> http.client.HTTPConnection:
        if self.address.startswith("unix://"):
            return _SocketConnection(self.address.removeprefix("unix://"))
        host, _, port = self.address.removeprefix("http://").rpartition(":")
        return http.client.HTTPConnection(host, int(port))

    def open(
        self, path: str, body: Mapping[str, Any] | None = None
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        """Sends a request (GET where there is no body); ModelError with the server's own words where it refuses."""
        connection = self.connect()
        headers = {"Authorization": f"Bearer {self.key}", "Content-Type": "application/json"}
        try:
            method, text = ("GET", None) if body is None else ("POST", json.dumps(body))
            connection.request(method, path, text, headers)
            response = connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            raise ModelError(f"llama.cpp ended while it was asked: {self.last_words() or error}") from error
        if response.status != 200:
            with contextlib.closing(connection):
                said = response.read().decode(errors="replace")
            raise ModelError(f"llama.cpp refuses: {_server_message(said)}")
        return connection, response

    def post(self, path: str, body: Mapping[str, Any] | None) -> Any:
        connection, response = self.open(path, body)
        with contextlib.closing(connection):
            return json.loads(response.read())

    def get(self, path: str) -> Any:
        return self.post(path, None)

    def last_words(self) -> str:
        """The last error in its log."""
        log = self.folder / "log"
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
        told = [line for line in lines if "error" in line.lower() or "assert" in line.lower()]
        return (told or lines or [""])[-1].strip()

    def stop(self) -> None:
        if self.process.stdin:
            with contextlib.suppress(OSError):
                self.process.stdin.close()
        try:
            self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self.process.stdout:
            self.process.stdout.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def start_child(
    model: Path,
    *,
    context: int,
    parallel: int,
    threads: int,
    embedding: bool,
    batch: int,
    adapter: Path | None = None,
) -> Child:
    """Starts llama.cpp on a file, with a LoRA's file beside it if there is one, and waits until it answers.

    ModelError where it refuses the files.
    """
    folder = Path(tempfile.mkdtemp(prefix="myna-"))
    if len(str(folder)) > LONGEST_SOCKET_FOLDER and Path("/tmp").is_dir():
        folder.rmdir()
        folder = Path(tempfile.mkdtemp(prefix="myna-", dir="/tmp"))
    key = secrets.token_hex(16)
    has_unix = hasattr(socket, "AF_UNIX")
    settings = {
        "model": str(model.resolve()),
        "adapter": str(adapter.resolve()) if adapter else None,
        "host": str(folder / "s.sock") if has_unix else "127.0.0.1",
        "port": 8080 if has_unix else _free_port(),
        "key": key,
        "context": context,
        "parallel": parallel,
        "threads": threads,
        "embedding": embedding,
        "batch": batch,
    }
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-P", str(Path(__file__).with_name("llama_child.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            # a Ctrl-C at the terminal is for Myna, which closes it in its own order
            start_new_session=True,
            creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
        )
    child = Child(process, "", key, folder)
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(json.dumps(settings) + "\n")
    process.stdin.flush()
    watchdog = threading.Timer(START_SECONDS, process.kill)
    watchdog.daemon = True
    watchdog.start()
    try:
        answer = process.stdout.readline()
    except BaseException:
        child.stop()
        raise
    finally:
        watchdog.cancel()
    if not answer:
        process.wait()
        words = child.last_words()
        child.stop()
        if "No module named" in words:
            raise MachineError(f"llama.cpp is not installed: {words}", help="pip install xllamacpp")
        raise ModelError(f"llama.cpp cannot load it: {words or 'it ended without a word'}", where=str(model))
    return Child(process, json.loads(answer)["address"], key, folder)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _server_message(text: str) -> str:
    try:
        return str(json.loads(text)["error"]["message"])
    except (json.JSONDecodeError, KeyError, TypeError):
        return text[:200]

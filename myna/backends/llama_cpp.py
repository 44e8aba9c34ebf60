"""llama.cpp over a .gguf file: a child process behind a unix socket (a local port where there are none) and a secret key.

Shapes: T tokens · d hidden width · V vocabulary.

`score` needs every logit, which the server does not give. It does give each token's final hidden state (embeddings
without pooling and without normalisation); times the file's own head they are the logits.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import queue
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from myna.backends import GeneratedToken, Sampling
from myna.engine.threads import usable_cores
from myna.errors import MachineError, ModelError

START_SECONDS = 120
LONGEST_SOCKET_FOLDER = 90  # the path of a unix socket has at most 107 bytes
Float32 = npt.NDArray[np.float32]


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
        self, path: str, body: Mapping[str, Any]
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        """Sends a request; ModelError with the server's own words where it refuses."""
        connection = self.connect()
        headers = {"Authorization": f"Bearer {self.key}", "Content-Type": "application/json"}
        try:
            connection.request("POST", path, json.dumps(body), headers)
            response = connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            raise ModelError(f"llama.cpp ended while it was asked: {self.last_words() or error}") from error
        if response.status != 200:
            text = response.read().decode(errors="replace")
            raise ModelError(f"llama.cpp refuses: {_server_message(text)}")
        return connection, response

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        connection, response = self.open(path, body)
        with contextlib.closing(connection):
            return json.loads(response.read())

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
    model: Path, *, context: int, parallel: int, threads: int, embedding: bool, batch: int
) -> Child:
    """Starts llama.cpp on a file and waits until it answers. ModelError where it refuses the file."""
    folder = Path(tempfile.mkdtemp(prefix="myna-"))
    if len(str(folder)) > LONGEST_SOCKET_FOLDER and Path("/tmp").is_dir():
        folder.rmdir()
        folder = Path(tempfile.mkdtemp(prefix="myna-", dir="/tmp"))
    key = secrets.token_hex(16)
    has_unix = hasattr(socket, "AF_UNIX")
    settings = {
        "model": str(model.resolve()),
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


class LlamaCppBackend:
    """A .gguf file behind the Backend protocol. Children start when first needed and end with `close`.

    `context` is the longest prompt and answer together, in tokens; `parallel` how many are answered at once.
    """

    def __init__(self, path: Path, *, context: int, parallel: int = 1) -> None:
        self.path = path
        self.context = context
        self.parallel = parallel
        self._children: dict[str, Child] = {}

    @property
    def name(self) -> str:
        return self.path.name

    def _child(self, purpose: str) -> Child:
        if purpose not in self._children:
            scoring = purpose == "score"
            self._children[purpose] = start_child(
                self.path,
                context=self.context,
                parallel=1 if scoring else self.parallel,
                threads=usable_cores(),
                embedding=scoring,
                # embeddings come for one physical batch: the whole sequence must fit in it
                batch=max(512, self.context) if scoring else 512,
            )
        return self._children[purpose]

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Iterator[GeneratedToken]:
        for prompt in prompts:
            self._require_fits(len(prompt))
        child = self._child("generate")
        waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
        for index in range(len(prompts)):
            waiting.put(index)
        done: queue.SimpleQueue[GeneratedToken | BaseException | None] = queue.SimpleQueue()
        stop = threading.Event()

        def work() -> None:
            try:
                while not stop.is_set():
                    index = waiting.get_nowait()
                    for token in _stream(child, prompts[index], sampling, index):
                        done.put(GeneratedToken(index, token))
                        if stop.is_set():
                            return
            except queue.Empty:
                done.put(None)
            except BaseException as error:
                done.put(error)

        workers = [
            threading.Thread(target=work, daemon=True) for _ in range(min(self.parallel, len(prompts)))
        ]
        for worker in workers:
            worker.start()
        try:
            running = len(workers)
            while running:
                item = done.get()
                if isinstance(item, BaseException):
                    raise item
                if item is None:
                    running -= 1
                else:
                    yield item
        finally:
            stop.set()

    def score(self, token_ids: Sequence[int]) -> Float32:
        self._require_fits(len(token_ids) - 1)
        hidden_Td = self._hidden(token_ids)
        logits_TV = hidden_Td @ self._head_Vd.T
        logits_TV -= logits_TV.max(axis=1, keepdims=True)
        logits_TV -= np.log(np.exp(logits_TV).sum(axis=1, keepdims=True))
        return logits_TV

    def tokenize(self, text: str) -> list[int]:
        """llama.cpp's own ids of a text, control tokens read as such."""
        child = next(iter(self._children.values()), None) or self._child("score")
        body = {"content": text, "add_special": False, "parse_special": True}
        return [int(i) for i in child.post("/tokenize", body)["tokens"]]

    def close(self) -> None:
        for child in self._children.values():
            child.stop()
        self._children.clear()

    def _require_fits(self, num_tokens: int) -> None:
        if num_tokens >= self.context:
            raise ModelError(
                f"a prompt of {num_tokens} tokens does not fit into a context of {self.context}",
                where=self.name,
                help="a shorter conversation: /reset in the chat",
            )

    def _hidden(self, token_ids: Sequence[int]) -> Float32:
        answer = self._child("score").post("/embedding", {"content": list(token_ids), "embd_normalize": -1})
        hidden_Td = np.asarray(answer[0]["embedding"], dtype=np.float32)
        if hidden_Td.shape[0] != len(token_ids):
            raise ModelError(
                f"llama.cpp gave {hidden_Td.shape[0]} hidden states for {len(token_ids)} tokens",
                where=self.name,
            )
        return hidden_Td

    @cached_property
    def _head_Vd(self) -> Float32:
        """The file's output head (the token embedding where they are tied), decoded."""
        from gguf import GGUFReader
        from gguf.quants import dequantize

        tensors = {tensor.name: tensor for tensor in GGUFReader(self.path).tensors}
        head = tensors.get("output.weight", tensors.get("token_embd.weight"))
        if head is None:
            raise ModelError("has neither output.weight nor token_embd.weight", where=str(self.path))
        return np.asarray(dequantize(head.data, head.tensor_type), dtype=np.float32)


def _stream(child: Child, prompt: Sequence[int], sampling: Sampling, index: int) -> Iterator[int]:
    """New tokens of one prompt as the server sends them (server-sent events)."""
    body = {
        "prompt": list(prompt),
        "n_predict": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        # off: only what Sampling names is done, as in every backend
        "top_k": 0,
        "min_p": 0.0,
        "repeat_penalty": sampling.repeat_penalty,
        "repeat_last_n": sampling.repeat_last_n,
        "seed": (sampling.seed + index) % 2**32,
        "stream": True,
        "return_tokens": True,
        "cache_prompt": True,
    }
    connection, response = child.open("/completion", body)
    with contextlib.closing(connection):
        for event in _events(response):
            if "error" in event:
                raise ModelError(f"llama.cpp refuses: {event['error'].get('message', event['error'])}")
            for token in event.get("tokens") or []:
                if token in sampling.stop_ids:
                    return
                yield int(token)
            if event.get("stop"):
                return
    raise ModelError(f"llama.cpp ended in the middle of an answer: {child.last_words()}")


def _events(response: http.client.HTTPResponse) -> Iterator[Any]:
    """The server-sent events of an answer; a connection that breaks just ends them."""
    with contextlib.suppress(OSError, http.client.HTTPException):
        for line in response:
            if line.startswith(b"data: "):
                yield json.loads(line[6:])

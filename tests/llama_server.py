"""llama.cpp in a child on a unix socket, its key-value cache in float32 so that nothing but the file makes a difference."""

from __future__ import annotations

import http.client
import json
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

SERVE = """
import ctypes, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # end with the test
import xllamacpp as x
p = x.CommonParams()
p.model.path, p.hostnames, p.port, p.api_keys = sys.argv[1], [sys.argv[2]], 1, ["key"]
p.n_ctx, p.n_parallel, p.warmup, p.ui, p.fit_params, p.verbosity = int(sys.argv[3]), 1, False, False, False, 1
p.cache_type_k = p.cache_type_v = x.ggml_type.GGML_TYPE_F32
p.flash_attn_type = x.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
p.cpuparams.n_threads = 1
server = x.Server(p)  # returns when the model is loaded
print("ready", flush=True)
sys.stdin.read()
"""


@dataclass(frozen=True)
class LlamaCpp:
    socket_path: Path

    def post(self, endpoint: str, body: dict[str, Any]) -> Any:
        connection = http.client.HTTPConnection("localhost")
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.connect(str(self.socket_path))
        headers = {"Authorization": "Bearer key", "Content-Type": "application/json"}
        connection.request("POST", endpoint, json.dumps(body), headers)
        response = connection.getresponse()
        answer = json.loads(response.read())
        connection.close()
        assert response.status == 200, answer
        return answer

    def tokens(self, text: str, add_special: bool = False) -> list[int]:
        body = {"content": text, "add_special": add_special, "parse_special": True}
        ids: list[int] = self.post("/tokenize", body)["tokens"]
        return ids

    def greedy(self, prompt: Sequence[int], count: int) -> list[int]:
        body = {"prompt": list(prompt), "n_predict": count, "temperature": 0, "return_tokens": True}
        ids: list[int] = self.post("/completion", body)["tokens"]
        return ids

    def log_probabilities(self, prompt: Sequence[int], vocab_size: int) -> torch.Tensor:
        """[V] of the token after `prompt`. The server only tells where that token is whole UTF-8."""
        body = {
            "prompt": list(prompt),
            "n_predict": 1,
            "temperature": 0,
            "n_probs": vocab_size,
            "cache_prompt": False,
        }
        entries = self.post("/completion", body)["completion_probabilities"][0]["top_logprobs"]
        assert len(entries) == vocab_size
        answer = torch.zeros(vocab_size)
        for entry in entries:
            answer[entry["id"]] = entry["logprob"]
        return answer


@contextmanager
def llama_cpp(gguf_path: Path, tmp_path: Path, context: int = 256) -> Iterator[LlamaCpp]:
    socket_path = tmp_path / "s.sock"
    command = [sys.executable, "-c", SERVE, str(gguf_path), str(socket_path), str(context)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as child:
        try:
            assert child.stdout and child.stderr
            assert child.stdout.readline() == "ready\n", child.stderr.read()[-2000:]
            yield LlamaCpp(socket_path)
        finally:
            child.kill()
            socket_path.unlink(missing_ok=True)

"""The child process that llama.cpp lives in: an assertion inside it ends this process, never Myna's.

Started by its path by `llama_cpp.start_child`; it imports nothing of Myna's. The first line of standard input is one
JSON object (model, address, key, …). It answers one JSON line {"address": …} on standard output and then serves until
standard input closes, which it does when the parent ends, however it ends.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any


def serve(settings: dict[str, Any]) -> str:
    """Starts llama.cpp's server as `settings` say; returns its address."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = settings["model"]
    if settings["adapter"]:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(settings["adapter"], 1.0)]
    params.hostnames = [settings["host"]]
    params.port = settings["port"]
    params.api_keys = [settings["key"]]
    params.n_ctx = settings["context"] * settings["parallel"]
    params.n_parallel = settings["parallel"]
    params.n_batch = params.n_ubatch = settings["batch"]
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = settings["threads"]
    params.n_gpu_layers = 0
    params.fit_params = params.warmup = params.ui = False
    params.verbosity = 1
    if settings["embedding"]:
        params.embedding = True
        params.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_NONE
        params.embd_normalize = -1
    globals()["_server"] = server = xllamacpp.Server(params)
    return str(server.listening_address)


def child_main() -> None:
    answer = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever llama.cpp prints goes to the log, not into the answer
    address = serve(json.loads(sys.stdin.readline()))
    answer.write(json.dumps({"address": address}) + "\n")
    answer.flush()
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    child_main()

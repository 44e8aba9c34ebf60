"""Run by a python that has llama-cpp-python: llama.cpp's own `llama_model_quantize` over a list of jobs on stdin.

A job: {"source", "target": paths, "file_type": number of llama_ftype, "importance": an .npz by tensor name, or null}.
"""

from __future__ import annotations

import ctypes
import json
import sys
from typing import Any

import llama_cpp
import numpy as np

SAID: list[str] = []


@llama_cpp.llama_log_callback  # type: ignore[untyped-decorator, unused-ignore]
def listen(level: int, text: bytes, data: Any) -> None:
    SAID.append(text.decode("utf-8", errors="replace"))


def quantize(job: dict[str, Any]) -> None:
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype, settings.nthread = job["file_type"], 2
    arrays = dict(np.load(job["importance"])) if job["importance"] else {}
    if arrays:
        entries = (llama_cpp.llama_model_imatrix_data * (len(arrays) + 1))()  # a nameless one ends the list
        for entry, (name, values) in zip(entries, arrays.items(), strict=False):
            entry.name, entry.size = name.encode(), values.size
            entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        settings.imatrix = entries
    SAID.clear()
    source, target = job["source"].encode(), job["target"].encode()
    if llama_cpp.llama_model_quantize(source, target, ctypes.byref(settings)):
        sys.exit(f"{job}: " + "".join(SAID[-5:]))


llama_cpp.llama_log_set(listen, None)
for job in json.load(sys.stdin):
    quantize(job)
print(llama_cpp.__version__)

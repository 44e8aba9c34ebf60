"""llama.cpp's own quantize tool as an oracle: where it is, how it is run, and how its file is compared with ours."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from myna.export.quantize import QUANT_TYPES

HERE = Path(__file__).parent
Floats = np.ndarray[Any, np.dtype[np.float32]]


def oracle_python() -> str | None:
    """The python that has llama-cpp-python: the one named by MYNA_ORACLE_PYTHON, or this one."""
    named = os.environ.get("MYNA_ORACLE_PYTHON")
    return named or (sys.executable if importlib.util.find_spec("llama_cpp") else None)


def upstream_files(
    source: Path, file_types: Sequence[str], importance: Mapping[str, Floats] | None = None
) -> dict[str, Path]:
    """`source` (a GGUF file) quantized by upstream, file type → path beside it. Skips where there is no upstream."""
    python = oracle_python()
    if python is None:
        pytest.skip("llama-cpp-python is not installed, and MYNA_ORACLE_PYTHON names no python that has it")
    matrix = None
    if importance is not None:
        matrix = source.with_suffix(".npz")
        np.savez(matrix, **importance)  # type: ignore[arg-type, unused-ignore]
    targets = {name: source.with_name(f"upstream-{name}.gguf") for name in file_types}
    jobs = [
        {
            "source": str(source),
            "target": str(target),
            "file_type": QUANT_TYPES[name].number,
            "importance": str(matrix) if matrix else None,
        }
        for name, target in targets.items()
    ]
    command, job_list = [python, str(HERE / "upstream_quantize.py")], json.dumps(jobs)
    done = subprocess.run(command, input=job_list, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return targets


@dataclass(frozen=True)
class Comparison:
    """Our file against upstream's. `nearer` and `worse`: of the tensors with other bytes, measured at the source."""

    num_tensors: int
    same_type: int
    same_bytes: int
    nearer: int
    worse: int
    differences: tuple[str, ...]
    our_bytes: int
    upstream_bytes: int


def compare(source: Path, ours: Path, theirs: Path) -> Comparison:
    """Tensor by tensor, by name."""
    sources, our_tensors, upstream_tensors = (
        {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors} for path in (source, ours, theirs)
    )
    assert our_tensors.keys() == upstream_tensors.keys() == sources.keys()
    same_type = same_bytes = nearer = worse = 0
    differences = []
    for name, our in our_tensors.items():
        upstream = upstream_tensors[name]
        if our.tensor_type != upstream.tensor_type:
            differences.append(f"{name}: {our.tensor_type.name}, upstream {upstream.tensor_type.name}")
            continue
        same_type += 1
        if np.array_equal(our.data, upstream.data):
            same_bytes += 1
            continue
        exact = decoded(sources[name])
        errors = [float(np.linalg.norm(decoded(tensor) - exact)) for tensor in (our, upstream)]
        nearer += errors[0] <= errors[1]
        worse += errors[0] > errors[1]
        differences.append(
            f"{name} ({our.tensor_type.name}): error {errors[0]:.6g}, upstream {errors[1]:.6g}"
        )
    return Comparison(
        *(len(sources), same_type, same_bytes, nearer, worse, tuple(differences)),
        *(ours.stat().st_size, theirs.stat().st_size),
    )


def decoded(tensor: Any) -> Floats:
    values: Floats = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    return values


def random_importance(source: Path, seed: int = 0) -> dict[str, Floats]:
    """[C] weights over two powers of ten for each matrix of a block, as measured ones are spread."""
    random_ = np.random.default_rng(seed)
    return {
        tensor.name: np.exp(random_.normal(0, 1.5, int(tensor.shape[0]))).astype(np.float32)
        for tensor in gguf.GGUFReader(source).tensors
        if tensor.name.startswith("blk.") and len(tensor.shape) == 2
    }

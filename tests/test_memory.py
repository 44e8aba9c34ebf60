"""The memory estimate against what training really takes, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from myna.engine.estimate import BaseShape, estimate_memory
from myna.engine.memory import memory_mb, peak_memory_mb, total_memory_mb

ROOT = Path(__file__).parent.parent

# A step over packs of 2,048 tokens of a model large enough to be seen beside torch itself; prints MB above the beginning.
MEASURE = """
import json, sys
import numpy as np, torch
from transformers import AutoModelForCausalLM
import tiny
from myna.adapters.methods import add_adapter, trainable_parameters
from myna.data.packing import collate
from myna.data.render import Example
from myna.engine.memory import memory_mb, peak_memory_mb
from myna.engine.optim import flatten_adapter
from myna.engine.step import choose_kernels, make_stepper
from myna.recipe import AdapterSettings, TrainSettings

kernels, layers, path = sys.argv[1], int(sys.argv[2]), sys.argv[3]
torch.set_num_threads(1)
tools = choose_kernels(kernels, 1)
warm = torch.ones(64, 64) @ torch.ones(64, 64)
import peft
before = memory_mb()
config = tiny.model_config("llama", vocab_size=8000, hidden_size=256, intermediate_size=768, num_hidden_layers=6,
    num_attention_heads=8, num_key_value_heads=4, head_dim=32, max_position_embeddings=2048)
model = AutoModelForCausalLM.from_config(config).requires_grad_(False)
model = add_adapter(model, AdapterSettings(r=16), seed=1, base_name="x")
adapter = flatten_adapter(trainable_parameters(model), TrainSettings())
stepper = make_stepper(model, path, kernels=tools, checkpoint_layers=layers)
ids = np.random.default_rng(0).integers(3, 8000, (8, 256))
batch = collate([Example(row, row) for row in ids])
for _ in range(2):
    stepper.loss(batch).backward()
    adapter.step(1e-4)
print(json.dumps([before, peak_memory_mb()]))
"""


def really_taken(*arguments: str) -> float:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    before, peak = json.loads(done.stdout.splitlines()[-1])
    return float(peak - before)


def estimated(*, native: bool, checkpoint_layers: int = 0, fast: bool = True, **changes: Any) -> float:
    shape = BaseShape(
        layers=6,
        width=256,
        inner=768,
        gated=True,
        query=256,
        key_value=128,
        heads=8,
        vocabulary=8000,
        tied=True,
    )
    found = estimate_memory(
        shape,
        **{"dtype": "fp32", "rank": 16, "tokens": 2048, "quantize": "none"} | changes,
        fast=fast,
        native=native,
        checkpoint_layers=checkpoint_layers,
    )
    return max(found.loading, found.weights + found.adapter + found.activations + found.temporaries)


WAYS = [("torch", 0, "fast"), ("torch", 1, "fast"), ("torch", 0, "reference")]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process is read as Linux has it")
@pytest.mark.parametrize(("kernels", "layers", "path"), WAYS)
def test_the_estimate_is_what_is_taken(kernels: str, layers: int, path: str) -> None:
    taken = really_taken(kernels, str(layers), path)
    guess = estimated(native=False, checkpoint_layers=layers, fast=path == "fast")
    assert 0.7 * taken <= guess <= 1.6 * taken


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process is read as Linux has it")
def test_the_estimate_is_what_the_c_kernels_take() -> None:
    from myna.engine.step import best_kernels

    if best_kernels("cpu", "fp32")[0] != "native":
        pytest.skip("no C kernels here")
    taken, guess = really_taken("native", "0", "fast"), estimated(native=True)
    assert 0.7 * taken <= guess <= 1.6 * taken


def test_what_makes_training_larger_makes_the_estimate_larger() -> None:
    plain = estimated(native=True)
    assert estimated(native=True, tokens=4096) > 1.5 * plain
    assert estimated(native=True, checkpoint_layers=1) < 0.7 * plain
    assert estimated(native=True, dtype="bf16") < 0.8 * plain
    assert estimated(native=True, rank=64) > plain
    assert estimated(native=False) > plain
    assert estimated(native=False, fast=False) > 2 * plain


def test_memory_is_told_in_order() -> None:
    # Linux brings a process's peak up to date a little late
    assert 10 < memory_mb() <= 1.05 * peak_memory_mb() < total_memory_mb()


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process is read as Linux has it")
def test_a_peak_is_not_that_of_whoever_started_the_process() -> None:
    held = bytearray(300_000_000)
    held[::4096] = b"x" * len(held[::4096])
    program = "from myna.engine.memory import peak_memory_mb; print(peak_memory_mb())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 150 < peak_memory_mb()
    del held

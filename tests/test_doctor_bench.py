from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import peft
import pytest
import torch
from conftest import Command
from transformers import LlamaConfig, LlamaForCausalLM

from myna import doctor_bench
from myna.data.packing import collate
from myna.data.render import Example
from myna.doctor import Report
from myna.doctor_bench import (
    PEAKS,
    SHAPES,
    SHARE_OF_PEAK,
    Bench,
    Expectation,
    as_table,
    expect,
    expectations,
    flops_a_token,
    try_kernels,
)
from myna.engine import native, peaks
from myna.engine.decoder import FastDecoder
from myna.engine.estimate import BaseShape
from myna.engine.native_library import native_library
from myna.engine.peaks import copy_bandwidth, product_peak
from myna.engine.threads import fast_in_bfloat16, fast_in_int8
from myna.engine.torch_kernels import TorchKernels
from myna.errors import MachineError
from myna.machine import Finding, memory_room
from myna.plan import cpu_dtype

# In millions, as their makers give them.
PARAMETERS = {"135M": 134.5, "360M": 361.8, "0.5B": 494, "1B": 1_236, "1.5B": 1_544, "3B": 3_213, "8B": 8_030}


def llama(shape: BaseShape) -> LlamaForCausalLM:
    """A llama of a shape whose weights are nowhere."""
    config = LlamaConfig(
        hidden_size=shape.width,
        num_hidden_layers=shape.layers,
        intermediate_size=shape.inner,
        num_attention_heads=shape.heads,
        head_dim=shape.query // shape.heads,
        num_key_value_heads=shape.key_value * shape.heads // shape.query,
        vocab_size=shape.vocabulary,
        tie_word_embeddings=shape.tied,
    )
    with torch.device("meta"):
        return LlamaForCausalLM(config)


@pytest.mark.parametrize("name", SHAPES)
def test_the_shapes_are_of_the_size_they_say(name: str) -> None:
    num_parameters = llama(SHAPES[name]).num_parameters()
    assert num_parameters / 1e6 == pytest.approx(PARAMETERS[name], rel=0.005)


@pytest.mark.parametrize("name", ["135M", "0.5B"])
@pytest.mark.parametrize("target_share", [0.25, 1.0])
def test_the_work_of_a_token_is_the_engine_s(name: str, target_share: float) -> None:
    lora = peft.LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    with torch.device("meta"):
        model = peft.get_peft_model(llama(replace(SHAPES[name], layers=6)), lora)
    decoder = FastDecoder(model, TorchKernels())
    ids = torch.zeros(401, dtype=torch.int64).numpy()
    labels = ids.copy()
    labels[1 + int(400 * target_share) :] = -100
    batch = collate([Example(ids, labels)])
    assert len(batch.targets_N) == 400 * target_share
    told = decoder.product_flops(batch) / 401
    mine = flops_a_token(replace(SHAPES[name], layers=6), 16, target_share)
    assert mine == pytest.approx(told, rel=0.05)


def test_what_is_expected_follows_from_the_peak() -> None:
    flops = flops_a_token(SHAPES["1B"])
    assert flops == expect("1B", "int8", "bf16", 1e12, 0.3, 1e15, has_kernels=True).flops_a_token
    for base in ("bf16", "fp32", "int8"):
        found = expect("1B", base, "bf16", 3e12, 0.3, 1e15, has_kernels=True)
        assert found.tokens_per_s == pytest.approx(9e11 / flops)
        assert found.fits
        assert not expect("1B", base, "bf16", 3e12, 0.3, found.memory_bytes - 1, has_kernels=True).fits
        assert expect("1B", base, "bf16", 3e12, 0.3, found.memory_bytes, has_kernels=True).fits
    assert expect("1B", "int8", "bf16", None, 0.3, 1e15, has_kernels=True).tokens_per_s is None
    memory = [
        expect(name, base, "bf16", 1, 1, 1, has_kernels=True).memory_bytes
        for name in ("135M", "8B")
        for base in ("int8", "bf16")
    ]
    assert memory == sorted(memory)
    assert 16e9 < memory[-1] < 30e9  # 8 billion weights of two bytes, and what training adds


def test_the_table_has_a_line_a_model() -> None:
    kernels = Finding("kernels", "warn", "none")
    speeds = (("bf16", 9.6), ("int8", None))
    made = [Expectation(m, b, 1.0, s, 3_000_000_000, b != "int8") for m in SHAPES for b, s in speeds]
    heads, rows, note = as_table(Bench((kernels,), tuple(made)))
    assert heads == ("model", "by default, tokens/s", "memory", "int8, tokens/s", "memory")
    assert rows[0] == ("135M", "10 bf16", "3.0 GB", "–", "3.0 GB, above 60 % of all")
    assert [row[0] for row in rows] == [*SHAPES]
    assert "slower" in note
    assert "slower" not in as_table(Bench((replace(kernels, status="ok"),), tuple(made)))[2]


@pytest.mark.parametrize("integers", [True, False])
def test_int8_is_expected_as_it_is_multiplied_here(integers: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_bench, "fast_in_int8", lambda: integers)
    found = expectations({"fp32": 1e11, "bf16": 2e11, "int8": 4e11}, has_kernels=True)
    (small,) = (e for e in found if (e.model, e.base) == ("135M", "int8"))
    peak, name = (4e11, "int8") if integers else (1e11, "fp32")
    assert small.tokens_per_s == pytest.approx(
        peak * SHARE_OF_PEAK[fast_in_bfloat16()][name] / small.flops_a_token
    )
    note = as_table(Bench((Finding("kernels", "ok", ""),), found))[2]
    assert ("int8 weights are multiplied in fp32" in note) == (not integers)


def test_findings_of_a_bench_take_the_place_of_what_was_known() -> None:
    def finding(name: str, text: str) -> Finding:
        return Finding(name, "ok", text)

    report = Report((finding("a", "old"), finding("kernels", "old"), finding("b", "old")))
    joined = Bench((finding("peak:fp32", "new"), finding("kernels", "new")), ()).joined(report)
    assert [(f.name, f.text) for f in joined.findings] == [
        ("a", "old"),
        ("kernels", "new"),
        ("b", "old"),
        ("peak:fp32", "new"),
    ]


@pytest.fixture
def forgotten() -> Iterator[None]:
    """As in a process that has not loaded the kernels yet."""
    caches = (native_library, native._try_once)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


def test_kernels_that_cannot_be_had_are_said(monkeypatch: pytest.MonkeyPatch, forgotten: None) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    finding = try_kernels(1)
    assert (finding.name, finding.status, finding.cure) == ("kernels", "warn", "unset CC")
    assert "no-such-compiler" in finding.text and "slower" in finding.text


def test_the_doctor_measures(myna: Command) -> None:
    done = myna("doctor", "--bench", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    for dtype in PEAKS:
        assert 1e8 < report["findings"][f"peak:{dtype}"]["value"] < 1e15
    assert 1e8 < report["findings"]["bandwidth"]["value"] < 1e13
    assert "doctor --bench" not in report["findings"]["kernels"]["text"]
    assert [entry["model"] for entry in report["training"]] == [name for name in SHAPES for _ in range(2)]
    by_default = [entry["base"] for entry in report["training"] if entry["base"] != "int8"]
    # fp32, if at all, for the smaller ones; what they are is the plan's own rule
    assert by_default == sorted(by_default, reverse=True) and {*by_default} <= {"fp32", "bf16"}
    total, fast = memory_room()[1] / 1e6, fast_in_bfloat16()
    assert by_default == [
        cpu_dtype(shape, fast_bf16=fast, total_memory_mb=total) for shape in SHAPES.values()
    ]
    for entry in report["training"]:
        slow = {"bf16": not fast, "int8": not fast_in_int8()}.get(entry["base"], False)
        multiplied = "fp32" if slow else entry["base"]
        peak = report["findings"][f"peak:{multiplied}"]["value"]
        flops = peak * SHARE_OF_PEAK[fast][multiplied] / entry["tokens_per_s"]
        assert flops == pytest.approx(entry["flops_a_token"])


def test_the_doctor_draws_a_table(myna: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peaks, "SIDES", (64,))
    monkeypatch.setattr(peaks, "COPY_BYTES", 4_000)
    shown = myna("doctor", "--bench").stdout
    assert "GFLOP/s" in shown
    assert "Training speed to expect" in shown
    for name in SHAPES:
        assert f"\n{name} " in shown
    assert "training" not in json.loads(myna("doctor", "--json").stdout)


# Peaks


def test_a_rate_is_work_over_the_best_time() -> None:
    calls = []

    def work() -> None:
        calls.append(0)
        time.sleep(0.05 if len(calls) == 1 else 0.01)

    rate = peaks._rate(work, 50.0, 0.2, "cpu")
    assert 50 / 0.04 < rate <= 50 / 0.01
    assert 3 <= len(calls) <= 16


@pytest.mark.parametrize("dtype", PEAKS)
def test_a_product_is_counted_as_two_operations_a_multiply(
    dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = []
    monkeypatch.setattr(peaks, "SIDES", (64,))

    def rate(call: Callable[[], torch.Tensor], flops: float, *_: object) -> float:
        work.append(call())
        return flops

    monkeypatch.setattr(peaks, "_rate", rate)
    assert product_peak(dtype) == 2 * 64**3
    (answer,) = work
    assert answer.shape == (64, 64)
    assert answer.dtype == {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int32}[dtype]


def test_sizes_that_would_take_long_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []
    monkeypatch.setattr(peaks, "_PRODUCTS", {"fp32": lambda side, device: side})

    def rate(side: object, flops: float, *_: object) -> float:
        asked.append(flops)
        return speed

    monkeypatch.setattr(peaks, "_rate", rate)
    for speed, num_sides in ((1e9, 1), (5e9, 2), (1e11, 3)):
        asked.clear()
        assert product_peak("fp32") == speed and len(asked) == num_sides


def test_threads_are_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peaks, "SIDES", (64,))
    monkeypatch.setattr(peaks, "SECONDS_A_SIDE", 0)
    before, seen = torch.get_num_threads(), []
    monkeypatch.setattr(peaks, "_nothing", lambda: seen.append(torch.get_num_threads()))
    assert product_peak("fp32", threads=before + 1) > 0
    assert {*seen} == {before + 1}
    monkeypatch.setattr(peaks, "COPY_BYTES", 4_000)
    monkeypatch.setattr(peaks, "COPY_SECONDS", 0)
    assert copy_bandwidth(threads=before + 1) > 0
    assert torch.get_num_threads() == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there() -> None:
    with pytest.raises(MachineError, match="no fp32 matrix product on cuda"):
        product_peak("fp32", device="cuda")

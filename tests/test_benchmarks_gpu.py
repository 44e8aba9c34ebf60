"""The GPU race, its whole flow on a tiny shape on a CPU: every side computes one thing, the page says what it came to."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

import _gpu_lap
import train_gpu
from _children import Child

from myna.errors import MachineError


def in_this_process(command: Sequence[object], **_: object) -> Child:
    """What a child would print, with torch loaded once for all of them."""
    if command[1] != train_gpu.LAP:
        return Child(0.0, 0.0, "{}", "")
    lap = json.loads(str(command[2]))
    return Child(1.0, 123.0, json.dumps(_gpu_lap.LAPS[lap["variant"]](lap)) + "\n", "")


def race(monkeypatch: pytest.MonkeyPatch, folder: Path, *words: str) -> dict[str, Any]:
    monkeypatch.setattr(train_gpu, "run_child", in_this_process)
    given = ["--tiny", "--device", "cpu", "--warm", "1", "--results", str(folder), *words]
    monkeypatch.setattr(sys, "argv", ["benchmarks/train_gpu.py", *given])
    train_gpu.main()
    written: dict[str, Any] = json.loads(next(folder.glob("*-train-gpu-tiny.json")).read_text())
    return written


@pytest.mark.slow
def test_the_whole_race_on_a_tiny_shape(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = race(monkeypatch, tmp_path, "--tokens", "128", "256", "--steps", "2", "--repeats", "2")
    assert [(r["shape"], r["tokens"], r["dtype"]) for r in found["races"]] == [
        ("tiny", 128, "fp32"),
        ("tiny", 256, "fp32"),
    ]
    for made in found["races"]:
        assert list(made["laps"]) == ["myna", "padded", "unpacked"]
        first, *others = [lap["losses"] for laps in made["laps"].values() for lap in laps]
        assert len(first) == 3 and len(others) == 5
        for losses in others:  # one model, one adapter untrained, the same rows and targets on every side
            assert losses[0] == pytest.approx(first[0], rel=1e-6)
            assert losses == pytest.approx(first, rel=1e-3)
    page = next(tmp_path.glob("*.md")).read_text()
    assert page.count("| Myna, packed |") == 2 and "## tiny, 256 tokens a step, fp32" in page
    assert "TRL + Liger, padded was not raced: no --peer-python was given." in page
    assert str(tmp_path) not in page and capsys.readouterr().out.strip() == page.strip()


def test_checkpointed_laps_are_the_same_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = ("--tokens", "128", "--steps", "1", "--repeats", "1")
    laps = race(monkeypatch, tmp_path, *few, "--checkpointing", "--json")["races"][0]["laps"]
    assert laps["padded"][0]["losses"] == pytest.approx(laps["myna"][0]["losses"], rel=1e-3)
    assert laps["myna"][0]["peak_mb"] == 123.0


def test_halves_are_scaled_on_every_side() -> None:
    given = {"shape": "tiny", "tokens": 128, "device": "cpu", "steps": 1, "warm": 0, "checkpointing": True}
    losses = []
    for variant, dtype in (("myna", "fp16"), ("padded", "fp16"), ("myna", "fp32")):
        lap = given | {"variant": variant, "dtype": dtype, "micro": 8}
        losses.append(_gpu_lap.LAPS[variant](lap)["losses"][0])
    assert losses == pytest.approx(losses[-1:] * 3, rel=1e-3)


def test_without_a_gpu_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train_gpu, "run_child", lambda *_, **__: Child(0.0, 0.0, "null\n", ""))
    monkeypatch.setattr(sys, "argv", ["benchmarks/train_gpu.py", "--json"])
    with pytest.raises(SystemExit) as left:
        train_gpu.main()
    error = json.loads(capsys.readouterr().out)["error"]
    assert left.value.code == MachineError.exit_code == 4
    assert error["message"] == "torch sees no CUDA device here" and "--tiny --device cpu" in error["help"]


def test_rows_of_a_step_have_its_tokens() -> None:
    for tokens in (128, 2048, 8192):
        rows = _gpu_lap.made_rows({"shape": "8b", "tokens": tokens}, 0)
        assert sum(len(ids) for ids, _ in rows) == tokens and len(rows) == 8
        assert all(0 < answer < len(ids) for ids, answer in rows)
        assert rows == _gpu_lap.made_rows({"shape": "8b", "tokens": tokens}, 0)
        assert rows != _gpu_lap.made_rows({"shape": "8b", "tokens": tokens}, 1)


def test_the_shapes_are_the_published_ones() -> None:
    """Parameters of the models that they are named after: 1,235,814,400 and 8,030,261,248."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    counts = []
    for shape in ("1b", "8b"):
        with torch.device("meta"):
            config = LlamaConfig(**(_gpu_lap.COMMON | _gpu_lap.SHAPES[shape]))
            counts.append(sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters()))
    assert counts == [1_235_814_400, 8_030_261_248]


def test_a_lap_without_memory_is_told() -> None:
    laps = {
        "myna": [train_gpu.Lap(200.0, 10.0), train_gpu.Lap(220.0, 12.0)],
        "padded": [train_gpu.Lap(100.0, 50.0), train_gpu.Lap(None, None)],
        "unpacked": [train_gpu.Lap(50.0, 20.0), train_gpu.Lap(70.0, 20.0)],
    }
    rows = train_gpu._table(laps, "cuda").splitlines()
    assert "| transformers + peft, padded | out of memory | 100 to 100 |  | out of memory |  |" in rows
    assert "| transformers + peft, row by row | 60 | 50 to 70 | 3.50 | 20 |  |" in rows
    assert "peak allocated, MB" in rows[0]


def test_peers_that_are_not_installed_are_named() -> None:
    found = train_gpu.missing_peers(Path(sys.executable))
    assert set(found) <= {"trl-liger", "unsloth"}
    for peer, why in found.items():
        assert any(module in why for module in train_gpu.NEEDED[peer])

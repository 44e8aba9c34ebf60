"""The points of the scaling benchmark: what is trained at each, the base and the rows made for it, and what it gave."""

from __future__ import annotations

import json
import random
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _children import ROOT, Child, run_child
from _laps import BASE, RECIPE, train_recipe

from myna.errors import CheckFailed

NUM_WARM = 1
# words that the packaged tokenizer and most others have as one token; rows get them in an order of their own
WORDS = (
    "time year people way day man thing woman life child world school state family student group country problem hand "
    "part place case week company system program question work government number night point home water room mother "
    "area money story fact month lot right study book eye job word business issue side kind head house service friend "
    "father power hour game line end member law car city community name president team minute idea kid body information"
)
WIDTHS = {256: (4, 1), 576: (9, 3), 1024: (16, 4), 1536: (24, 6)}  # heads and key-value heads, of 64 each
NUM_LAYERS = 4


@dataclass(frozen=True)
class Point:
    """`width` 0 is the packaged model, else a random llama of that width with few layers and a small vocabulary."""

    axis: str
    rows_a_step: int
    row_tokens: int
    width: int = 0
    checkpointing: str | int = "none"
    num_steps: int = 3


@dataclass(frozen=True)
class Measured:
    """A point with its figures: median of the steps that count, tokens as they really were, peak of the process."""

    point: Point
    seconds_a_step: float
    tokens_a_step: float
    peak_mb: float
    own_mb: float
    others: float
    checkpoint_layers: int | None = None


def all_points() -> list[Point]:
    """Rows a step, row length (one row a step), the longest rows with layers run again, width."""
    lengths = (128, 256, 512, 1024, 2048, 4096)
    return [
        *(Point("rows", rows, 128) for rows in (1, 2, 4, 8, 16, 32)),
        *(Point("length", 1, length, num_steps=2 if length > 2000 else 3) for length in lengths),
        *(Point("checkpointing", 1, 4096, checkpointing=kind, num_steps=2) for kind in ("auto", 5, "all")),
        *(Point("width", 8, 128, width=width) for width in WIDTHS),
    ]


def measure(point: Point, scratch: Path, fresh_mb: float) -> Measured:
    """Trains at a point in a process of its own, through the command line as it is shipped."""
    base = random_base(point.width, scratch) if point.width else BASE
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        rows_path = Path(folder) / "rows.jsonl"
        num_rows = point.rows_a_step * point.num_steps
        rows_path.write_text(
            "".join(json.dumps(row) + "\n" for row in made_rows(num_rows, point)), encoding="utf-8"
        )
        child, metrics, plan = train_recipe(blocks_of(point, base, rows_path), Path(folder), {})
    return measured(point, child, metrics, plan, fresh_mb)


def blocks_of(point: Point, base: str, rows_path: Path) -> dict[str, Any]:
    """The recipe of a point."""
    longest = point.row_tokens + point.row_tokens // 4 + 64
    settings = {"batch_size": point.rows_a_step, "gradient_checkpointing": point.checkpointing}
    return RECIPE | {
        "model": {"base": base, "dtype": "auto"},
        "data": {"train": str(rows_path), "test_fraction": 0.0, "max_length": longest},
        "train": RECIPE["train"] | settings,
    }


def made_rows(num_rows: int, point: Point) -> list[dict[str, str]]:
    """Rows of about `row_tokens` tokens, half of them the answer; alike is only what the chat template begins with."""
    drawn = random.Random(0)
    overhead = 32 if point.width == 0 else 20  # what the chat template adds
    per_word = 1.0 if point.width == 0 else 5.0
    num_words = max(8, round((point.row_tokens - overhead) / per_word))
    made = []
    for number in range(num_rows):
        words = [str(number), *drawn.choices(WORDS.split(), k=num_words)]
        middle = len(words) // 2
        made.append({"prompt": " ".join(words[:middle]), "completion": " ".join(words[middle:])})
    return made


def measured(
    point: Point, child: Child, metrics: Sequence[Mapping[str, Any]], plan: Mapping[str, Any], fresh_mb: float
) -> Measured:
    """CheckFailed where fewer steps were run than the point wants."""
    if len(metrics) != point.num_steps:
        raise CheckFailed(f"{len(metrics)} steps instead of {point.num_steps}", where="metrics.jsonl")
    counted = metrics[NUM_WARM:]
    return Measured(
        point=point,
        seconds_a_step=statistics.median(line["seconds"] for line in counted),
        tokens_a_step=statistics.median(line["tokens"] for line in counted),
        peak_mb=child.peak_mb,
        own_mb=child.peak_mb - fresh_mb,
        others=child.others,
        checkpoint_layers=plan.get("checkpoint_layers"),
    )


def random_base(width: int, scratch: Path) -> str:
    """A folder with a random llama of that width, made once in a process of its own, since it takes torch."""
    folder = scratch / f"width-{width}"
    if not folder.is_dir():
        heads, kv_heads = WIDTHS[width]
        sizes = {
            "hidden_size": width,
            "intermediate_size": -(-width * 8 // 3 // 64) * 64,
            "num_hidden_layers": NUM_LAYERS,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": 64,
            "max_position_embeddings": 8192,
            "initializer_range": 0.02,
        }
        program = (
            f"from pathlib import Path; import tiny; tiny.write_base(Path({str(folder)!r}), **{sizes!r})"
        )
        python_path = f"{ROOT}:{ROOT / 'tests'}"
        run_child([sys.executable, "-c", program], cwd=scratch, variables={"PYTHONPATH": python_path})
    return str(folder)

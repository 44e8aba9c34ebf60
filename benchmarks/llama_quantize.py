"""Our GGUF files against those of llama.cpp's own quantize tool, type by type, as a table.

    MYNA_ORACLE_PYTHON=.venv-oracle/bin/python python benchmarks/llama_quantize.py smollm2-135m > table.md

The argument is a base as a recipe names it, or `random:WIDTH` for a random two-layer llama. With `--importance` both are
given the same importance matrix: measured over rows of text for a base, random for a random model.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "oracle")]

from llama_oracle import Comparison, Floats, compare, random_importance, upstream_files  # noqa: E402
from tiny_gguf import write_model, write_tokenizer  # noqa: E402

from myna.export.gguf import write_gguf  # noqa: E402
from myna.export.importance import measure_importance  # noqa: E402
from myna.export.quantize import QUANT_TYPES  # noqa: E402
from myna.model.families import family_of  # noqa: E402
from myna.model.load import load_base  # noqa: E402
from myna.model.sources import resolve_base  # noqa: E402
from myna.run import read_json  # noqa: E402

COLUMNS = "type | tensors | same type | same bytes | nearer | worse | ours, MB | upstream, MB | ours, s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base")
    parser.add_argument(
        "--importance", type=Path, help="a text file to measure over, or any name for random:WIDTH"
    )
    parser.add_argument("--types", nargs="*", default=list(QUANT_TYPES), help="all, where none is named")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = _model(arguments.base, Path(scratch) / "model")
        source = Path(scratch) / "source.gguf"
        write_gguf(folder, folder, source, "F32", name="model")
        importance = _importance(arguments, folder, source) if arguments.importance else None
        print(f"| {COLUMNS} |\n|{' --- |' * (COLUMNS.count('|') + 1)}")
        for name in arguments.types:
            if importance is not None or not QUANT_TYPES[name].needs_importance:
                seconds, found = _one(folder, source, name, importance)
                print(f"| {name} | {_cells(found)} | {seconds:.1f} |", flush=True)
                for difference in found.differences:
                    print(f"    {name}: {difference}", file=sys.stderr)


def _one(
    folder: Path, source: Path, file_type: str, importance: Mapping[str, Floats] | None
) -> tuple[float, Comparison]:
    theirs = upstream_files(source, [file_type], importance)[file_type]
    ours = source.with_name("ours.gguf")
    started = time.perf_counter()
    write_gguf(folder, folder, ours, file_type, name="model", importance=importance)
    seconds = time.perf_counter() - started
    found = compare(source, ours, theirs)
    theirs.unlink()
    return seconds, found


def _cells(found: Comparison) -> str:
    counts = (found.num_tensors, found.same_type, found.same_bytes, found.nearer, found.worse)
    sizes = (f"{size / 1e6:.3f}" for size in (found.our_bytes, found.upstream_bytes))
    return " | ".join((*map(str, counts), *sizes))


def _model(base: str, folder: Path) -> Path:
    if not base.startswith("random:"):
        return resolve_base(base).folder
    width = int(base.removeprefix("random:"))
    sizes = {"hidden_size": width, "intermediate_size": width * 3 // 2, "num_attention_heads": width // 64}
    write_model(folder, head_dim=64, num_key_value_heads=2, **sizes)
    write_tokenizer(folder)
    return folder


def _importance(arguments: argparse.Namespace, folder: Path, source: Path) -> dict[str, Floats]:
    if arguments.base.startswith("random:"):
        return random_importance(source)
    from tokenizers import Tokenizer

    text = arguments.importance.read_text(encoding="utf-8")
    ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids[:8192]
    rows = [ids[start : start + 512] for start in range(0, len(ids), 512)]
    config = read_json(folder / "config.json")
    return measure_importance(load_base(folder, "fp32"), family_of(config), rows)


if __name__ == "__main__":
    main()

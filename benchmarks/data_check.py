"""How fast rows are read and checked, and how much memory that takes, stage by stage; the page goes to benchmarks/results/.

    python benchmarks/data_check.py [--megabytes 50] [--base FOLDER]

The rows are made here: prompts and answers of drawn words, no two alike. Every stage is a process of its own; rates are of
the file's bytes over what the process takes more than one that reads ten rows, memory is what it takes more than that one.
With `--base`, a folder with a tokenizer, rows are rendered too, against the tokenizer's library alone on texts as long.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from _children import run_child  # noqa: E402
from _machine import RESULTS_DIR, commit, load_average, machine, say, shown_command, today  # noqa: E402
from _points import WORDS  # noqa: E402
from _race_page import table  # noqa: E402

# by name: what a process does with the file that it is given
STAGES: Mapping[str, str] = {
    "read: JSON, keys, places": "for _ in scan_rows(path): pass",
    "and the shape found out, conversations made": "stream_rows(path, Nothing)",
    "data check without near duplicates and private data": "review_rows(path, private=False, near=False)",
    "the same by one process": "spans.plan = lambda size: None; review_rows(path, private=False, near=False)",
    "the same with near duplicates": "review_rows(path, private=False)",
    "the same with private data": "review_rows(path, near=False)",
    "conversations kept for a run": "len(read_conversations(path).conversations)",
    "and parted into training and test rows": (
        "split_rows(read_conversations(path).conversations, test_fraction=0.1, seed=1)"
    ),
}
# the same work in tokens: by the library alone, and as rows are rendered for training
TOKENS: Mapping[str, str] = {
    "texts tokenized by the library alone, in batches": (
        "texts = [text_of(c) for c in rows]; began = time.perf_counter()\n"
        "for n in range(0, len(texts), 1024):\n"
        "    tokenizer.tokenizer.encode_batch_fast(texts[n : n + 1024], add_special_tokens=False)"
    ),
    "rows rendered for training": (
        "began = time.perf_counter()\nfor _ in render_many(rows, tokenizer, 2048): pass"
    ),
}
PROGRAM = (
    "import sys; from pathlib import Path; from myna.data import spans; from myna.data.sources import scan_rows\n"
    "from myna.data.rows import read_conversations; from myna.data.review import review_rows\n"
    "from myna.data.split import split_rows; from myna.data.stream import stream_rows; path = Path(sys.argv[1])\n"
    "class Nothing:\n    def take(self, one): pass\n    def refuse(self, one): pass\n"
)
TOKEN_PROGRAM = (
    "import sys, time; from pathlib import Path; from myna.data.rows import read_conversations\n"
    "from myna.data.render import load_chat_tokenizer; from myna.data.render_many import render_many\n"
    "tokenizer = load_chat_tokenizer(Path(sys.argv[2])); rows = list(read_conversations(Path(sys.argv[1])).conversations)\n"
    "text_of = lambda c: tokenizer.render_text(c, add_generation_prompt=False)\n"
)
FEW = 10


def main() -> None:
    arguments = _arguments()
    before = load_average()
    with tempfile.TemporaryDirectory(prefix="myna-rows-") as folder:
        whole, few = Path(folder) / "rows.jsonl", Path(folder) / "few.jsonl"
        num_rows = write_rows(whole, int(arguments.megabytes * 1e6))
        write_rows(few, 1, fewest=FEW)
        rows = [
            measure(name, whole, few, num_rows, arguments.repeats)
            for name in STAGES
            if arguments.stages in name
        ]
        tokens = token_table(Path(folder), arguments) if arguments.base else ""
    head = (
        f"# Reading and checking rows\n\n{today()} · {machine()} · commit {commit()} · load before: {before}\n\n"
        f"`{shown_command(sys.argv)}`: {num_rows:,} rows of JSONL, {arguments.megabytes:g} MB; "
        f"medians of {arguments.repeats}.\n\n"
    )
    page = head + table("what is done | MB/s | seconds | memory, MB | bytes a row", rows) + "\n" + tokens
    place = arguments.results / f"{today()}-data-check.md"
    arguments.results.mkdir(parents=True, exist_ok=True)
    place.write_text(page, encoding="utf-8")
    print(page)


def measure(name: str, whole: Path, few: Path, num_rows: int, repeats: int) -> list[str]:
    """One stage as a line of the page."""
    command = [sys.executable, "-c", PROGRAM + STAGES[name]]
    pairs = [
        [run_child([*command, path], cwd=ROOT, variables={"PYTHONPATH": str(ROOT)}) for path in (whole, few)]
        for _ in range(repeats)
    ]
    seconds = statistics.median(large.seconds - small.seconds for large, small in pairs)
    memory = statistics.median(large.peak_mb for large, _ in pairs)
    more = memory - statistics.median(small.peak_mb for _, small in pairs)
    rate = whole.stat().st_size / 1e6 / seconds
    say(f"{name}: {rate:.0f} MB/s, {memory:.0f} MB")
    return [name, f"{rate:.0f}", f"{seconds:.2f}", f"{memory:.0f}", f"{1e6 * more / num_rows:.0f}"]


def token_table(folder: Path, arguments: argparse.Namespace) -> str:
    """Rows in tokens, against the library alone: they take turns, and each is its own process."""
    path = folder / "tokens.jsonl"
    num_rows = write_rows(path, int(arguments.token_megabytes * 1e6))
    taken: dict[str, list[float]] = {name: [] for name in TOKENS}
    for _ in range(arguments.repeats):
        for name, work in TOKENS.items():
            code = TOKEN_PROGRAM + work + "\nprint(time.perf_counter() - began)"
            command = [sys.executable, "-c", code, str(path), str(arguments.base)]
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                check=True,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
            )
            taken[name].append(float(done.stdout))
            say(f"{name}: {taken[name][-1]:.2f} s")
    seconds = {name: statistics.median(all_taken) for name, all_taken in taken.items()}
    first = next(iter(seconds.values()))
    megabytes = path.stat().st_size / 1e6
    lines = [
        [name, f"{megabytes / one:.1f}", f"{1e6 * one / num_rows:.0f}", f"{one / first:.2f}"]
        for name, one in seconds.items()
    ]
    return "\n" + table("in tokens | MB/s | µs a row | against the library", lines) + "\n"


def write_rows(path: Path, size: int, *, fewest: int = 1) -> int:
    """Rows of drawn words until the file has `size` bytes; how many."""
    drawn, words, written, num_rows = random.Random(0), WORDS.split(), 0, 0
    with path.open("w", encoding="utf-8") as file:
        while written < size or num_rows < fewest:
            prompt, answer = (" ".join(drawn.choices(words, k=drawn.randint(10, 60))) for _ in range(2))
            written += file.write(json.dumps({"prompt": f"{num_rows} {prompt}", "completion": answer}) + "\n")
            num_rows += 1
    return num_rows


def _arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=float, default=50)
    parser.add_argument("--stages", default="", help="those alone whose name has this text in it")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--base", type=Path, help="a folder with a tokenizer: rows are rendered too")
    parser.add_argument("--token-megabytes", type=float, default=8)
    parser.add_argument("--results", type=Path, default=RESULTS_DIR)
    return parser.parse_args(given)


if __name__ == "__main__":
    main()

"""How fast rows are read and checked, and how much memory that takes, stage by stage; the page goes to benchmarks/results/.

    python benchmarks/data_check.py [--megabytes 50]

The rows are made here: prompts and answers of drawn words, no two alike. Every stage is a process of its own and does all of
the one before it too; rates are of the file's bytes over what the process takes more than one that reads ten rows.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
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
    "and the shape found out, conversations made": "read_conversations(path)",
    "and warnings, without private data": "review_rows(path, private=False)",
    "and secrets and personal data": "review_rows(path)",
}
PROGRAM = (
    "import sys; from pathlib import Path; from myna.data.sources import scan_rows; "
    "from myna.data.rows import read_conversations; from myna.data.review import review_rows; path = Path(sys.argv[1])\n"
)
FEW = 10


def main() -> None:
    arguments = _arguments()
    before = load_average()
    with tempfile.TemporaryDirectory(prefix="myna-rows-") as folder:
        whole, few = Path(folder) / "rows.jsonl", Path(folder) / "few.jsonl"
        num_rows = write_rows(whole, int(arguments.megabytes * 1e6))
        write_rows(few, 1, fewest=FEW)
        rows = [measure(name, whole, few, num_rows, arguments.repeats) for name in STAGES]
    head = (
        f"# Reading and checking rows\n\n{today()} · {machine()} · commit {commit()} · load before: {before}\n\n"
        f"`{shown_command(sys.argv)}`: {num_rows:,} rows of JSONL, {arguments.megabytes:g} MB; "
        f"medians of {arguments.repeats}.\n\n"
    )
    page = head + table("what is done | MB/s | seconds | memory, MB | bytes a row", rows) + "\n"
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
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--results", type=Path, default=RESULTS_DIR)
    return parser.parse_args(given)


if __name__ == "__main__":
    main()

"""Reads made-up files of rows for as long as it is told: the long form of tests/test_rows_fuzz.py.

    python scripts/fuzz_rows.py [--minutes 10] [--seed 0]

Every batch has a seed of its own, so that a run finds what the one before did not. A failure ends it with the least example
that Hypothesis finds, and the seed that makes it again.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from hypothesis import HealthCheck, seed, settings

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from test_json_lines import test_what_is_read_at_once_is_what_the_slow_way_reads as lines  # noqa: E402
from test_rows_fuzz import test_any_bytes, test_any_values  # noqa: E402

EXAMPLES = 1000  # of a batch


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    long = settings(
        max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), database=None
    )
    ends, number = time.monotonic() + 60 * arguments.minutes, arguments.seed
    while time.monotonic() < ends:
        for test in (test_any_bytes, test_any_values, lines):
            seed(number)(long(test))()
        number += 1
        print(f"seeds to {number - 1}: nothing but conversations and clean errors", flush=True)


if __name__ == "__main__":
    main()

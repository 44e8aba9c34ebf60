"""Reads made-up files of rows for as long as it is told: the long form of tests/test_rows_fuzz.py.

    python scripts/fuzz_rows.py [--minutes 10] [--seed 0] [--examples 1000]

Every batch has a seed of its own, so that a run finds what the one before did not. A failure ends it with the least example
that Hypothesis finds, and the seed that makes it again.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, seed, settings

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from test_json_lines import test_what_is_read_at_once_is_what_the_slow_way_reads as lines  # noqa: E402
from test_rows_fuzz import test_any_bytes, test_any_values  # noqa: E402


def batch(test: Any, number: int, num_examples: int) -> None:
    """So many examples of a test, from a seed of their own. Its own settings, made for the short form, are left behind."""
    long = settings(
        max_examples=num_examples,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        database=None,
    )
    handle = test.hypothesis

    @functools.wraps(
        handle.inner_test, updated=()
    )  # its marks stay behind: what has settings takes no others
    def plain(*values: Any, **named: Any) -> None:
        handle.inner_test(*values, **named)

    seed(number)(long(given(**handle._given_kwargs)(plain)))()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--examples", type=int, default=1000, help="of each test, to a seed")
    arguments = parser.parse_args()
    ends, number = time.monotonic() + 60 * arguments.minutes, arguments.seed
    while time.monotonic() < ends:
        for test in (test_any_bytes, test_any_values, lines):
            batch(test, number, arguments.examples)
        number += 1
        print(f"seeds to {number - 1}: nothing but conversations and clean errors", flush=True)


if __name__ == "__main__":
    main()

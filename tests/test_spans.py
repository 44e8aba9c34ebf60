"""A large file checked by several processes: the answer of one, to the last place, and none of them is left behind."""

from __future__ import annotations

import json
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from myna.data import detect, spans, stream
from myna.data.lines import blocks_of, lines_in, spans_of
from myna.data.review import Review, review_rows
from myna.errors import MachineError

Planned = tuple[int, int] | None


def line(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode() + b"\n"


def pair(n: int, answer: str = "a") -> bytes:
    return line({"prompt": f"question {n}", "completion": answer})


# few prompts and answers, so that many repeat and contradict others; faults of every kind of a line; other shapes
GOOD = [pair(n, answer) for n in range(4) for answer in ("yes", "no <s>", "да, oнa", "a\0b")]
LINES = [
    *GOOD,
    line({"prompt": "سلام", "completion": "x" * 40, "id": 7}),
    line({"prompt": "mail", "completion": "to someone@example.org"}),
    line({"instruction": "do", "output": "done"}),
    line(
        {"messages": [{"role": "user", "content": "hi", "mood": 1}, {"role": "assistant", "content": "ho"}]}
    ),
    line({"prompt": "", "completion": "a"}),
    line({"prompt": 1, "completion": None}),
    line({"context": "c", "question": "q", "answers": {"text": []}}),
    b"\n",
    b"broken\n",
    b'{"prompt": "\xff", "completion": "a"}\n',
    b'{"prompt": "a", "prompt": "b", "completion": "c"}\r\n',
    b'{"prompt": "old", "completion": "mac"}\r{"prompt": "old", "completion": "line ends"}\n',
]


@contextmanager
def planned(value: Planned, *, pickled: bool = False, guessed: int = 1000) -> Iterator[None]:
    honest: Callable[[spans.Task], spans.Answer] = spans._work

    def through_a_pipe(task: spans.Task) -> spans.Answer:
        answer = honest(pickle.loads(pickle.dumps(task)))
        made: spans.Answer = pickle.loads(pickle.dumps(answer))
        return made

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(spans, "plan", lambda num_bytes: value)
        patched.setattr(spans, "GUESSED", guessed)
        patched.setattr(stream, "GUESSED", guessed)
        if pickled:
            patched.setattr(spans, "_work", through_a_pipe)
        yield


def told(review: Review) -> tuple[Any, ...]:
    """All of a review, single faults too."""
    return (review.as_json(), [(str(one), one.code, one.place, one.ends_reading) for one in review.faults])


@given(
    st.lists(st.sampled_from(LINES), min_size=1, max_size=24),
    st.integers(1, 400),
    st.sampled_from([1, 3, 1000]),
)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example([LINES[-6], *GOOD], 30, 1)
@example([LINES[18], *GOOD], 100, 1)  # another shape than the first row has
@example([pair(1), LINES[18], LINES[18], LINES[18]], 60, 1)
def test_the_answer_is_that_of_one_process(
    tmp_path: Path, lines: list[bytes], span_bytes: int, guessed: int
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"".join(lines))
    with planned(None, guessed=guessed):
        alone = told(review_rows(path, near=False, keep_faults=True))
    with planned((0, span_bytes), pickled=True, guessed=guessed):
        assert told(review_rows(path, near=False, keep_faults=True)) == alone


@pytest.mark.parametrize("num_bytes", [1, 30, 64, 400, 10**6])
def test_spans_are_all_of_a_file_and_whole_lines(tmp_path: Path, num_bytes: int) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"".join(LINES)[:-1])
    content, found = path.read_bytes(), list(spans_of(path, num_bytes))
    assert [0, *(span.end for span in found)] == [*(span.start for span in found), len(content)]
    assert all(content[:end].endswith(b"\n") for _, end, _ in found[:-1])
    assert (len(found) == 1) == (num_bytes > len(content)) and (num_bytes > 1 or len(found) == len(LINES))
    lines = [line for block in blocks_of(path) for line in lines_in(block)]
    for span in found:
        own = [line for block in blocks_of(path, span) for line in lines_in(block)]
        assert lines[span.num_before : span.num_before + len(own)] == own


@pytest.mark.parametrize("end", [b"", b"\n", b"\n\n\n"])
@pytest.mark.parametrize("begin", [b"", b"\xef\xbb\xbf", b"\n"])
def test_how_a_file_begins_and_ends(tmp_path: Path, begin: bytes, end: bytes) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(begin + b"".join(GOOD).rstrip(b"\n") + end)
    alone = told(review_rows(path, near=False))
    with planned((0, 50)):
        assert told(review_rows(path, near=False)) == alone


def test_children_give_the_same_answer(tmp_path: Path) -> None:
    path, test = tmp_path / "a.jsonl", tmp_path / "test.jsonl"
    words = "the quick brown fox jumps over the lazy dog and runs away from all of them"
    near = [pair(100 + n, f"{words} {n % 3} {words}") for n in range(60)]
    path.write_bytes(b"".join(LINES * 30 + near + LINES))
    test.write_bytes(pair(2, "held out"))
    alone = told(review_rows(path, test=test, keep_faults=True))
    answered: set[int] = set()
    with planned((2, 4000)), pytest.MonkeyPatch.context() as patched:
        honest, work = spans._ask, spans._work

        def ask(child: spans.Child, task: spans.Task) -> spans.Answer:
            answer = honest(child, task)
            answered.add(child.pid)
            return answer

        def work_later(task: spans.Task) -> spans.Answer:
            until = time.monotonic() + 20
            while len(answered) < 2 and time.monotonic() < until:
                time.sleep(0.001)
            return work(task)

        patched.setattr(spans, "_ask", ask)
        patched.setattr(spans, "_work", work_later)
        assert told(review_rows(path, test=test, keep_faults=True)) == alone
    assert len(answered) == 2 and not any(Path(f"/proc/{pid}").is_dir() for pid in answered)
    assert {"D030", "D031", "D032", "D036"} <= {one["code"] for one in alone[0]["findings"]}


def test_labels_are_counted_over_all_spans(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"".join(pair(n, "spam" if n % 20 else "ham") for n in range(100)))
    with planned((0, 500)):
        assert [one.code for one in review_rows(path, near=False).findings] == ["D033"]


def test_rows_of_more_kinds_than_are_told_apart_are_read_in_one_piece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(detect, "MOST_GROUPS", 6)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"".join(line({"prompt": f"q{n}", "completion": "a", f"own{n}": 1}) for n in range(20)))
    alone = told(review_rows(path, near=False))
    with planned((0, 100)):
        assert told(review_rows(path, near=False)) == alone


def test_what_cannot_be_parted_is_read_in_one_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spans, "_joined", None)
    log = [line({"sender": name, "text": "hi", "conversation_id": 1}) for name in ("user", "bot")]
    contents = {
        "list.jsonl": b"[" + pair(1) + b"," + pair(2) + b"]",
        "wide.jsonl": b"".join(GOOD).decode().encode("utf-16"),
        "mac.jsonl": b"".join(GOOD).replace(b"\n", b"\r"),
        "log.jsonl": b"".join(log),
        "table.csv": b"prompt,completion\nq,a\n",
        "none.jsonl": b"",
    }
    with planned((0, 50)):
        for name, content in contents.items():
            (tmp_path / name).write_bytes(content)
            review_rows(tmp_path / name)
        review_rows(tmp_path / "missing.jsonl")


def test_a_child_that_dies_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"".join(GOOD * 20))
    for code, how in (
        ("import os; os._exit(9)", "exit code 9"),
        ("import os; os.kill(os.getpid(), 9)", "signal 9"),
    ):
        monkeypatch.setattr(spans, "SERVE", code)
        with planned((1, 200)), pytest.raises(MachineError, match=how):
            review_rows(path, near=False)


def test_a_file_that_changes_while_children_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"".join(GOOD))
    honest = spans._check

    def check(task: spans.Task) -> spans.Part:
        path.write_bytes(b"".join(GOOD * 2))
        return honest(task)

    monkeypatch.setattr(spans, "_check", check)
    with planned((0, 100)):
        review = review_rows(path, near=False)
    assert [one.places[0][1] for one in review.findings if one.code == "D007"] == [
        "changed while it was read"
    ]
    assert not review.usable


def test_small_files_and_one_core_have_no_children() -> None:
    assert spans.plan(spans.LEAST_BYTES - 1) is None


def children_in(listed: Path) -> list[str]:
    try:
        return listed.read_text().split()
    except OSError:  # the thread has ended
        return []


@pytest.mark.skipif(sys.platform != "linux", reason="needs to see a process's children")
def test_control_c_ends_children_with_one_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"".join(pair(n, "word " * 40) for n in range(100_000)))
    assert path.stat().st_size > spans.LEAST_BYTES
    process = subprocess.Popen(
        [sys.executable, "-m", "myna.cli", "data", "check", str(path)],
        cwd=tmp_path,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    threads = Path(f"/proc/{process.pid}/task")
    until = time.monotonic() + 60
    while not (children := [pid for one in threads.glob("*/children") for pid in children_in(one)]):
        if spans.plan(path.stat().st_size) is None:
            process.kill()
            pytest.skip("one core")
        assert process.poll() is None and time.monotonic() < until, "it never asked for help"
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    said, complained = process.communicate(timeout=60)
    assert process.returncode == 130 and not said
    assert len(complained.strip().splitlines()) <= 2 and "stopped" in complained, complained
    assert not any(Path(f"/proc/{pid}").is_dir() for pid in children)

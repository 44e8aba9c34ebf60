"""Rows are rendered once: found again by their content, gone on with where it was interrupted, the same in memory."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from myna.data import token_cache
from myna.data.conversation import Conversation, Message, Place
from myna.data.render import ChatTokenizer, load_chat_tokenizer, render_examples
from myna.data.render_many import render_many
from myna.data.token_cache import RenderedCounts, make_room, render_into_tokens
from myna.data.token_rows import DONE, TokenRows, TokenWriter

LONG = 120  # tokens


def talk(n: int, size: int = 3, *, trained: bool = True, path: str = "a.jsonl") -> Conversation:
    messages = (
        Message("user", f"question {n} " + "word " * size),
        Message("assistant", f"answer {n}", trained),
    )
    return Conversation(messages, Place(path, n + 1))


def text(n: int) -> Conversation:
    return Conversation(
        (Message("assistant", f"a text of its own, number {n}. " * 20),), Place("t.txt", n + 1)
    )


SOURCES = [
    [*(talk(n) for n in range(40)), talk(40, 60), talk(41, trained=False)],
    [text(1), *(talk(n, path="b.jsonl") for n in range(5)), text(2)],
]


@pytest.fixture(scope="module")
def tokenizer(tiny_base: Path) -> ChatTokenizer:
    return load_chat_tokenizer(tiny_base)


@pytest.fixture
def cached(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row is worth a cache, and each is committed at once."""
    monkeypatch.setattr(token_cache, "CACHED_FROM", 0)
    monkeypatch.setattr(token_cache, "SECONDS_A_COMMIT", -1.0)


def require_all(found: tuple[TokenRows, list[RenderedCounts]], tokenizer: ChatTokenizer) -> None:
    rows, counts = found
    each = [[one for c in source for one in render_examples(c, tokenizer, LONG)] for source in SOURCES]
    kept = [[one for one in source if one.num_targets] for source in each]
    assert [count.num_kept for count in counts] == [len(source) for source in kept]
    for row, one in zip(rows, (one for source in kept for one in source), strict=True):
        assert row.input_ids_T.tolist() == one.input_ids_T.tolist()
        assert row.labels_T.tolist() == one.labels_T.tolist()
        assert (row.num_cut, row.place) == (one.num_cut, one.place)
    assert [count.num_rows for count in counts] == [len(source) for source in SOURCES]
    assert [count.num_cut for count in counts] == [1, 0] and counts[0].first_long == "a.jsonl:41"
    assert [count.num_masked for count in counts] == [
        len(a) - len(b) for a, b in zip(each, kept, strict=True)
    ]
    assert [count.num_texts for count in counts] == [0, 2] and counts[1].num_pieces > 4


def unused(*_: Any) -> None:
    raise AssertionError("rendered again")


def test_few_rows_stay_in_memory(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    require_all(render_into_tokens(SOURCES, tokenizer, LONG, tmp_path / "tokens"), tokenizer)
    assert not (tmp_path / "tokens").exists()
    rows, counts = render_into_tokens([[]], tokenizer, LONG, tmp_path)
    assert len(rows) == 0 and counts[0].num_rows == 0


def test_what_was_rendered_is_not_rendered_again(
    tmp_path: Path, tokenizer: ChatTokenizer, cached: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_all(render_into_tokens(SOURCES, tokenizer, LONG, tmp_path), tokenizer)
    monkeypatch.setattr(token_cache, "render_many", unused)
    said: list[str] = []
    require_all(render_into_tokens(SOURCES, tokenizer, LONG, tmp_path, said.append), tokenizer)
    assert "read from the cache" in said[0]


CHANGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a letter": lambda given: given | {"sources": [[*SOURCES[0][:-1], talk(99)], SOURCES[1]]},
    "a weight": lambda given: given | {"sources": [[*SOURCES[0][:-1], talk(41)], SOURCES[1]]},
    "a place": lambda given: given | {"sources": [[talk(0, path="c.jsonl"), *SOURCES[0][1:]], SOURCES[1]]},
    "the border of two files": lambda given: (
        given | {"sources": [SOURCES[0][:-1], [SOURCES[0][-1], *SOURCES[1]]]}
    ),
    "the length": lambda given: given | {"max_length": LONG + 1},
    "the template": lambda given: (
        given
        | {
            "tokenizer": ChatTokenizer(
                given["tokenizer"].tokenizer, "x" + given["tokenizer"].template_text, {}
            )
        }
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_whatever_changes_the_tokens_has_another_name(tokenizer: ChatTokenizer, name: str) -> None:
    given: dict[str, Any] = {"sources": SOURCES, "tokenizer": tokenizer, "max_length": LONG}
    assert token_cache._key(**given) == token_cache._key(**given)
    assert token_cache._key(**given)[0] != token_cache._key(**CHANGES[name](given))[0]


def test_what_was_interrupted_goes_on(
    tmp_path: Path, tokenizer: ChatTokenizer, cached: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def breaking(conversations: Any, *others: Any) -> Any:
        rows = list(conversations)
        asked.append(len(rows))
        for number, row in enumerate(render_many(rows, *others)):
            if len(asked) <= 2 and number == 15:
                raise KeyboardInterrupt
            yield row

    monkeypatch.setattr(token_cache, "render_many", breaking)
    said: list[str] = []
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            render_into_tokens(SOURCES, tokenizer, LONG, tmp_path, said.append)
    require_all(render_into_tokens(SOURCES, tokenizer, LONG, tmp_path, said.append), tokenizer)
    assert asked[0] > asked[1] > asked[2] and "goes on after 15 rows" in said[0]


def test_a_damaged_cache_is_rendered_anew(tmp_path: Path, tokenizer: ChatTokenizer, cached: None) -> None:
    require_all(render_into_tokens(SOURCES, tokenizer, LONG, tmp_path), tokenizer)
    (path,) = tmp_path.glob("*/ids.bin")
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    require_all(render_into_tokens(SOURCES, tokenizer, LONG, tmp_path), tokenizer)


def _hold(folder: Path, is_held: Any, may_end: Any) -> None:
    with token_cache._held(folder):
        is_held.set()
        may_end.wait(60)


def test_another_process_at_the_same_rows_is_left_alone(
    tmp_path: Path, tokenizer: ChatTokenizer, cached: None
) -> None:
    key, _ = token_cache._key(SOURCES, tokenizer, LONG)
    context = multiprocessing.get_context("spawn")
    is_held, may_end = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(tmp_path / key, is_held, may_end))
    process.start()
    assert is_held.wait(60)
    require_all(render_into_tokens(SOURCES, tokenizer, LONG, tmp_path), tokenizer)
    assert [path.name for path in (tmp_path / key).iterdir()] == [token_cache.LOCK]
    may_end.set()
    process.join()


def test_the_cache_has_bounds(
    tmp_path: Path, tokenizer: ChatTokenizer, cached: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for n in range(3):
        render_into_tokens([SOURCES[0][n:]], tokenizer, LONG, tmp_path)
    keys = {path.name for path in tmp_path.iterdir()}
    assert len(keys) == 3
    (newest,) = sorted(keys)[:1]
    monkeypatch.setattr(token_cache, "MOST_KEPT", 0)
    make_room(tmp_path, keep=newest)
    assert [path.name for path in tmp_path.iterdir()] == [newest] and (tmp_path / newest / DONE).is_file()


def test_a_text_of_no_tokens_moves_no_other_row(
    tmp_path: Path, tiny_base: Path, cached: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tokenizers import normalizers

    tokenizer = load_chat_tokenizer(tiny_base)
    tokenizer.tokenizer.normalizer = normalizers.Replace("\u200b", "")
    said = ("\u200b", "one", "two", "three")
    rows = [Conversation((Message("assistant", one),), Place("a.txt", n)) for n, one in enumerate(said)]
    commit, left = TokenWriter.commit, [2]

    def interrupted(writer: TokenWriter, facts: dict[str, Any]) -> None:
        commit(writer, facts)
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt

    monkeypatch.setattr(TokenWriter, "commit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        render_into_tokens([rows], tokenizer, LONG, tmp_path)
    found, (count,) = render_into_tokens([rows], tokenizer, LONG, tmp_path)
    assert [one.place for one in found] == [one.place for one in rows[1:]]
    assert (count.num_rows, count.num_kept, count.num_masked) == (4, 3, 1)

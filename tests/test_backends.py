"""Both backends behind one protocol: they continue and score alike, and llama.cpp never outlives who started it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import tiny
import torch

from myna.backends import Sampling, complete
from myna.backends.llama_cpp import LlamaCppBackend
from myna.backends.text import TextModel
from myna.backends.torch_backend import TorchBackend, choose_token
from myna.data.conversation import Conversation, Message
from myna.data.render import load_chat_tokenizer, render_prompt
from myna.errors import ModelError
from myna.export.gguf import write_gguf
from myna.model.load import load_base

ROOT = Path(__file__).parent.parent
PROMPTS = ([1, 40, 41, 42, 90], [1, 77], [1, *range(100, 160)], [1, 40, 41, 43])


@pytest.fixture(scope="module")
def model(tiny_base: Path) -> Any:
    return load_base(tiny_base, "fp32")


@pytest.fixture(scope="module")
def file(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny-F32.gguf"
    write_gguf(tiny_base, tiny_base, path, "F32", name="tiny")
    return path


@pytest.fixture(scope="module")
def llama(file: Path) -> Iterator[LlamaCppBackend]:
    backend = LlamaCppBackend(file, context=128, parallel=3)
    yield backend
    backend.close()


def test_answers_do_not_depend_on_who_is_answered_beside(model: Any) -> None:
    backend = TorchBackend(model, "tiny")
    for sampling in (
        Sampling(max_tokens=12, stop_ids=frozenset({2})),
        Sampling(max_tokens=12, temperature=0.9, top_p=0.8),
    ):
        together = complete(backend, PROMPTS, sampling)
        # each prompt's random generator is its own: seed + its index
        alone = [
            complete(backend, [prompt], Sampling(**{**vars(sampling), "seed": sampling.seed + index}))[0]
            for index, prompt in enumerate(PROMPTS)
        ]
        assert together == alone


def test_greedy_is_transformers_greedy(model: Any) -> None:
    ours = complete(TorchBackend(model, "tiny"), PROMPTS, Sampling(max_tokens=10))
    for prompt, answer in zip(PROMPTS, ours, strict=True):
        theirs = model.generate(
            torch.tensor([prompt]), max_new_tokens=10, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert theirs[0, len(prompt) :].tolist() == answer


def test_llama_cpp_answers_as_torch_does(model: Any, llama: LlamaCppBackend) -> None:
    sampling = Sampling(max_tokens=6)
    ours = complete(TorchBackend(model, "tiny"), PROMPTS, sampling)
    theirs = complete(llama, PROMPTS, sampling)
    # llama.cpp also stops at end-of-generation tokens that the file names
    assert [a[: len(b)] for a, b in zip(ours, theirs, strict=True)] == theirs
    assert any(theirs)


def test_llama_cpp_scores_as_torch_does(model: Any, llama: LlamaCppBackend) -> None:
    for prompt in PROMPTS:
        ours, theirs = TorchBackend(model, "tiny").score(prompt), llama.score(prompt)
        assert ours.shape == theirs.shape == (len(prompt), 400)
        assert np.abs(np.exp(theirs).sum(axis=1) - 1).max() < 1e-4
        # llama.cpp keeps keys and values in half precision
        assert np.abs(ours - theirs).max() < 0.05


def test_a_stop_id_ends_an_answer_and_is_not_part_of_it(model: Any, llama: LlamaCppBackend) -> None:
    for backend in (TorchBackend(model, "tiny"), llama):
        free = complete(backend, [PROMPTS[0]], Sampling(max_tokens=6))[0]
        stop = next(token for token in free[1:] if token != free[0])
        ended = complete(backend, [PROMPTS[0]], Sampling(max_tokens=6, stop_ids=frozenset({stop})))[0]
        assert ended == free[: free.index(stop)]


def test_token_ids_are_the_same_through_llama_cpp(tiny_base: Path, llama: LlamaCppBackend) -> None:
    tokenizer = load_chat_tokenizer(tiny_base)
    for text in ("<|im_start|>user\nI want 12 lamps<|im_end|>\n", "émile\n\n  x", "1234 a1b2"):
        assert llama.tokenize(text) == tokenizer.encode(text)


def test_a_choice_follows_the_penalty_top_p_and_temperature() -> None:
    logits = torch.tensor([2.0, 1.9, -1.0, -1.1])
    generator = torch.Generator().manual_seed(0)
    assert choose_token(logits, [0], Sampling(), generator) == 0
    assert choose_token(logits, [0], Sampling(repeat_penalty=1.2), generator) == 1
    assert choose_token(logits, [0, 3, 3], Sampling(repeat_penalty=1.2, repeat_last_n=2), generator) == 0
    negative = torch.tensor([-5.0, -1.0, -1.05])
    assert choose_token(negative, [1], Sampling(repeat_penalty=1.2), generator) == 2
    drawn = {choose_token(logits, [], Sampling(temperature=1.0, top_p=0.9), generator) for _ in range(200)}
    assert drawn == {0, 1}
    assert len({choose_token(logits, [], Sampling(temperature=5.0), generator) for _ in range(200)}) == 4


def test_text_comes_in_whole_characters(tiny_base: Path) -> None:
    """A backend that says é, one byte a token."""

    class Speller:
        name = "speller"

        def generate(self, prompts: Any, sampling: Sampling) -> Iterator[Any]:
            from myna.backends import GeneratedToken

            for token in tokenizer.encode("né é"):
                yield GeneratedToken(0, token)

        def score(self, token_ids: Any) -> Any:
            raise AssertionError

        def close(self) -> None: ...

    tokenizer = load_chat_tokenizer(tiny_base)
    text = TextModel(Speller(), tokenizer, system="be brief")
    pieces = list(text.stream(Conversation((Message("user", "x"),)), Sampling()))
    assert "".join(pieces) == "né é"
    assert all("\ufffd" not in piece for piece in pieces) and len(pieces) > 1


def test_the_system_text_is_used_where_there_is_none(tiny_base: Path) -> None:
    tokenizer = load_chat_tokenizer(tiny_base)
    seen: list[list[int]] = []

    class Listener:
        name = "listener"

        def generate(self, prompts: Any, sampling: Sampling) -> Iterator[Any]:
            seen.extend(list(p) for p in prompts)
            return iter(())

        def score(self, token_ids: Any) -> Any:
            raise AssertionError

        def close(self) -> None: ...

    model = TextModel(Listener(), tokenizer, system="be brief")
    own = Conversation((Message("system", "shout"), Message("user", "x")))
    for conversation in (own, Conversation(own.messages[1:])):
        list(model.stream(conversation, Sampling()))
    assert seen[0] == render_prompt(own, tokenizer)
    assert seen[1] == render_prompt(Conversation(own.messages[1:]).with_system("be brief"), tokenizer)


PARENT = """
import sys, pathlib
from myna.backends.llama_cpp import LlamaCppBackend
backend = LlamaCppBackend(pathlib.Path(sys.argv[1]), context=64)
backend.tokenize("x")
print(backend._children["score"].process.pid, flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_llama_cpp_ends_with_its_parent(file: Path, number: int) -> None:
    command = [sys.executable, "-c", PARENT, str(file)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        assert child.is_running()
        listening = [c for c in child.net_connections("inet") if c.status == psutil.CONN_LISTEN]
        assert not listening or not hasattr(__import__("socket"), "AF_UNIX")
        parent.send_signal(number)
        parent.wait()
        deadline = time.monotonic() + 10
        while child.is_running() and child.status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_a_file_that_is_no_model_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"GGUF" + b"\x00" * 100)
    with pytest.raises(ModelError, match=r"llama\.cpp cannot load it") as caught:
        LlamaCppBackend(path, context=64).tokenize("x")
    assert caught.value.where == str(path)


def test_a_wrong_key_is_turned_away(llama: LlamaCppBackend) -> None:
    from dataclasses import replace

    llama.tokenize("x")
    child = replace(next(iter(llama._children.values())), key="guess")
    with pytest.raises(ModelError, match="Invalid API Key"):
        child.post("/tokenize", {"content": "x"})


def test_a_prompt_longer_than_the_context_is_refused(llama: LlamaCppBackend) -> None:
    with pytest.raises(ModelError, match="does not fit"):
        complete(llama, [[1] * 128], Sampling(max_tokens=2))


def test_a_tokenizer_without_a_file_is_refused(tmp_path: Path) -> None:
    tiny.write_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"no tokenizer\.json"):
        load_chat_tokenizer(tmp_path)


def test_an_answer_that_breaks_off_is_no_answer(file: Path) -> None:
    backend = LlamaCppBackend(file, context=128)
    tokens = backend.generate([PROMPTS[0]], Sampling(max_tokens=100))
    next(tokens)
    backend._children["generate"].process.kill()
    with pytest.raises(ModelError, match=r"llama\.cpp ended"):
        list(tokens)
    backend.close()

"""llama.cpp over a .gguf file: a child process behind a unix socket (a local port where there are none) and a secret key.

Shapes: T tokens · d hidden width · V vocabulary.

`score` needs every logit, which the server does not give. It does give each token's final hidden state (embeddings
without pooling and without normalisation); times the file's own head they are the logits.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from myna.backends import GeneratedToken, Sampling
from myna.backends.llama_server import Child, start_child
from myna.data.conversation import Conversation
from myna.engine.threads import usable_cores
from myna.errors import ModelError
from myna.model.gguf_tensors import open_gguf

Float32 = npt.NDArray[np.float32]


class LlamaCppBackend:
    """A .gguf file behind the Backend protocol. Children start when first needed and end with `close`.

    `context` is the longest prompt and answer together, in tokens; `parallel` how many are answered at once;
    `adapter` a LoRA's file (`write_adapter_gguf`) that is added to the model of `path`.
    """

    def __init__(self, path: Path, *, context: int, parallel: int = 1, adapter: Path | None = None) -> None:
        self.path = path
        self.adapter = adapter
        self.context = context
        self.parallel = parallel
        self._children: dict[str, Child] = {}

    @property
    def name(self) -> str:
        return self.path.name

    def _child(self, purpose: str) -> Child:
        if purpose not in self._children:
            scoring = purpose == "score"
            self._children[purpose] = start_child(
                self.path,
                context=self.context,
                parallel=1 if scoring else self.parallel,
                threads=usable_cores(),
                embedding=scoring,
                # embeddings come for one physical batch: the whole sequence must fit in it
                batch=max(512, self.context) if scoring else 512,
                adapter=self.adapter,
            )
        return self._children[purpose]

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Iterator[GeneratedToken]:
        for prompt in prompts:
            self._require_fits(len(prompt))
        child = self._child("generate")
        waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
        for index in range(len(prompts)):
            waiting.put(index)
        done: queue.SimpleQueue[GeneratedToken | BaseException | None] = queue.SimpleQueue()
        stop = threading.Event()

        def work() -> None:
            try:
                while not stop.is_set():
                    index = waiting.get_nowait()
                    for token in _stream(child, prompts[index], sampling, index):
                        done.put(GeneratedToken(index, token))
                        if stop.is_set():
                            return
            except queue.Empty:
                done.put(None)
            except BaseException as error:
                done.put(error)

        workers = [
            threading.Thread(target=work, daemon=True) for _ in range(min(self.parallel, len(prompts)))
        ]
        for worker in workers:
            worker.start()
        try:
            running = len(workers)
            while running:
                item = done.get()
                if isinstance(item, BaseException):
                    raise item
                if item is None:
                    running -= 1
                else:
                    yield item
        finally:
            stop.set()

    def score(self, token_ids: Sequence[int]) -> Float32:
        self._require_fits(len(token_ids) - 1)
        hidden_Td = self._hidden(token_ids)
        logits_TV = hidden_Td @ self._head_Vd.T
        if self._logit_cap:
            logits_TV = self._logit_cap * np.tanh(logits_TV / self._logit_cap)
        logits_TV -= logits_TV.max(axis=1, keepdims=True)
        logits_TV -= np.log(np.exp(logits_TV).sum(axis=1, keepdims=True))
        return logits_TV

    def tokenize(self, text: str) -> list[int]:
        """llama.cpp's own ids of a text, control tokens read as such."""
        child = next(iter(self._children.values()), None) or self._child("score")
        body = {"content": text, "add_special": False, "parse_special": True}
        return [int(i) for i in child.post("/tokenize", body)["tokens"]]

    def chat_template(self) -> str:
        """The chat template that llama.cpp has of the file."""
        return str(self._child("generate").get("/props").get("chat_template", ""))

    def chat_prompt(self, conversation: Conversation, variables: Mapping[str, str]) -> tuple[str, list[int]]:
        """(text, ids) that llama.cpp's chat endpoint makes of messages, by its two halves: render, then tokenize."""
        child = self._child("generate")
        text = str(child.post("/apply-template", _asked(conversation, variables))["prompt"])
        body = {"content": text, "add_special": True, "parse_special": True}
        return text, [int(i) for i in child.post("/tokenize", body)["tokens"]]

    def chat_prompt_tokens(self, conversation: Conversation, variables: Mapping[str, str]) -> int:
        """How many tokens the chat endpoint itself says it gave the model for messages."""
        asked = {**_asked(conversation, variables), "max_tokens": 1, "temperature": 0}
        answer = self._child("generate").post("/v1/chat/completions", asked)
        return int(answer["usage"]["prompt_tokens"])

    def end_ids(self) -> frozenset[int]:
        """The tokens that the file itself says end something."""
        keys = [f"tokenizer.ggml.{kind}_token_id" for kind in ("eos", "eot", "eom")]
        values = open_gguf(self.path).values
        return frozenset(int(values[key]) for key in keys if key in values)

    def says_one_token(self, prompt: Sequence[int], token_id: int, bias: float) -> tuple[list[int], str]:
        """(what is said, why it ended: `eos` or `limit`) where one token is made all but certain, every time."""
        body = {
            "prompt": list(prompt),
            "n_predict": 3,
            "temperature": 0,
            "logit_bias": [[token_id, bias]],
            "return_tokens": True,
        }
        answer = self._child("generate").post("/completion", body)
        return [int(i) for i in answer["tokens"]], str(answer["stop_type"])

    def close(self) -> None:
        for child in self._children.values():
            child.stop()
        self._children.clear()

    def _require_fits(self, num_tokens: int) -> None:
        if num_tokens >= self.context:
            raise ModelError(
                f"a prompt of {num_tokens} tokens does not fit into a context of {self.context}",
                where=self.name,
                help="a shorter conversation: /reset in the chat",
            )

    def _hidden(self, token_ids: Sequence[int]) -> Float32:
        answer = self._child("score").post("/embedding", {"content": list(token_ids), "embd_normalize": -1})
        hidden_Td = np.asarray(answer[0]["embedding"], dtype=np.float32)
        if hidden_Td.shape[0] != len(token_ids):
            raise ModelError(
                f"llama.cpp gave {hidden_Td.shape[0]} hidden states for {len(token_ids)} tokens",
                where=self.name,
            )
        return hidden_Td

    @cached_property
    def _head_Vd(self) -> Float32:
        """The file's output head (the token embedding where they are tied), decoded, with the adapter's part in it."""
        file = open_gguf(self.path)
        names = [name for name in ("output.weight", "token_embd.weight") if name in file.header.tensors]
        if not names:
            raise ModelError("has neither output.weight nor token_embd.weight", where=str(self.path))
        head_Vd = file.rows(names[0])
        return head_Vd + _head_delta(self.adapter) if self.adapter else head_Vd

    @cached_property
    def _logit_cap(self) -> np.float32 | None:
        """c of Gemma's c·tanh(logit / c); None where the file's model has no such cap."""
        values = open_gguf(self.path).values
        architecture = values["general.architecture"]
        cap = values.get(f"{architecture}.final_logit_softcapping")
        if cap is None:  # llama.cpp's own value for a file of this architecture that does not say
            return np.float32(30.0) if architecture == "gemma2" else None
        return np.float32(cap) or None


def _head_delta(adapter: Path) -> Float32 | np.float32:
    """[V, d] what an adapter's file (in float32) adds to the head: alpha / r · B @ A, or 0."""
    file = open_gguf(adapter)
    if "output.weight.lora_a" not in file.header.tensors:
        return np.float32(0)
    a_rd, b_Vr = file.rows("output.weight.lora_a"), file.rows("output.weight.lora_b")
    delta_Vd: Float32 = b_Vr @ a_rd * np.float32(file.values["adapter.lora.alpha"] / len(a_rd))
    return delta_Vd


def _asked(conversation: Conversation, variables: Mapping[str, str]) -> dict[str, Any]:
    """Messages and tools as the chat endpoint takes them."""
    tools = conversation.tool_dicts()
    asked = {"messages": conversation.as_dicts(), "chat_template_kwargs": dict(variables)}
    return {**asked, "tools": tools} if tools else asked


def _stream(child: Child, prompt: Sequence[int], sampling: Sampling, index: int) -> Iterator[int]:
    """New tokens of one prompt as the server sends them (server-sent events)."""
    body = {
        "prompt": list(prompt),
        "n_predict": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        # off: only what Sampling names is done, as in every backend
        "top_k": 0,
        "min_p": 0.0,
        "repeat_penalty": sampling.repeat_penalty,
        "repeat_last_n": sampling.repeat_last_n,
        "seed": (sampling.seed + index) % 2**32,
        "stream": True,
        "return_tokens": True,
        "cache_prompt": True,
    }
    connection, response = child.open("/completion", body)
    with contextlib.closing(connection):
        for event in _events(response):
            if "error" in event:
                raise ModelError(f"llama.cpp refuses: {event['error'].get('message', event['error'])}")
            for token in event.get("tokens") or []:
                if token in sampling.stop_ids:
                    return
                yield int(token)
            if event.get("stop"):
                return
    raise ModelError(f"llama.cpp ended in the middle of an answer: {child.last_words()}")


def _events(response: http.client.HTTPResponse) -> Iterator[Any]:
    """The server-sent events of an answer; a connection that breaks just ends them."""
    with contextlib.suppress(OSError, http.client.HTTPException):
        for line in response:
            if line.startswith(b"data: "):
                yield json.loads(line[6:])

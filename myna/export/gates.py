"""Gates: what must be the same in a file as in the run, asked of llama.cpp itself. Each is a question with one answer.

    tokens     text → ids: llama.cpp's own tokenizer against the run's, over rendered conversations
    template   the chat template in the file is the run's, to the letter
    prompt     messages → ids by llama.cpp's chat endpoint (its Jinja, its BOS) against the run's rendering
    stop       a model that says a stop token has ended its answer
    weights    every block of every tensor decodes to its source (`export/blocks.py`)

How near the answers are (mean KL, same top token) is measured in `export/parity.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from myna.data.conversation import Conversation
from myna.data.render import ChatTokenizer, render_prompt
from myna.errors import ModelError

NUM_ASKED = 3  # conversations that are also sent through the chat endpoint, which counts the tokens it used
NUM_ORDINARY = 5  # tokens of answers that must not end one
# What llama.cpp gives a template of its own accord, and Myna does not: given to both, so that the rest is compared.
VARIABLES = {"date_string": "26 Jul 2024"}
TOOL_KEYS = ["name", "description", "parameters"]
STOP_BIAS = 1000.0  # added to one logit: the model says that token, whatever it was taught


class Server(Protocol):
    """What the gates ask of llama.cpp (`LlamaCppBackend`)."""

    def tokenize(self, text: str) -> list[int]: ...

    def chat_prompt(
        self, conversation: Conversation, variables: Mapping[str, str]
    ) -> tuple[str, list[int]]: ...

    def chat_prompt_tokens(self, conversation: Conversation, variables: Mapping[str, str]) -> int: ...

    def chat_template(self) -> str: ...

    def end_ids(self) -> frozenset[int]: ...

    def says_one_token(self, prompt: Sequence[int], token_id: int, bias: float) -> tuple[list[int], str]: ...


@dataclass(frozen=True)
class Gate:
    """One answer. `detail` says what was compared where it passes, and the first difference where it does not."""

    name: str
    passes: bool
    detail: str

    def as_json(self) -> dict[str, str]:
        return {"verdict": "pass" if self.passes else "fail", "detail": self.detail}


def ask_all(server: Server, tokenizer: ChatTokenizer, conversations: Sequence[Conversation]) -> list[Gate]:
    """The four gates that a running file answers, in the order of the table above."""
    return [GATES[name](server, tokenizer, conversations) for name in GATES]


def tokens_gate(server: Server, tokenizer: ChatTokenizer, conversations: Sequence[Conversation]) -> Gate:
    """Ids of every rendered conversation, control tokens read as such."""
    num_tokens = 0
    for number, conversation in enumerate(conversations):
        text = tokenizer.render_text(conversation, add_generation_prompt=False)
        ours, theirs = tokenizer.encode(text), server.tokenize(text)
        if ours != theirs:
            return Gate("tokens", False, _difference(ours, theirs, _place(conversation, number)))
        num_tokens += len(ours)
    return Gate("tokens", True, f"{num_tokens:,} tokens of {len(conversations)} conversations")


def template_gate(server: Server, tokenizer: ChatTokenizer, conversations: Sequence[Conversation]) -> Gate:
    """The file's template is the run's."""
    theirs = server.chat_template()
    if theirs == tokenizer.template_text:
        return Gate("template", True, f"{len(theirs):,} characters")
    return Gate("template", False, "the chat template in the file is not the run's")


def prompt_gate(server: Server, tokenizer: ChatTokenizer, conversations: Sequence[Conversation]) -> Gate:
    """Every conversation's prompt as llama.cpp's chat makes it: the same text, the same ids, no BOS twice.

    Conversations whose tools llama.cpp writes in a form of its own are left out, and that is said.
    """
    num_given, conversations = len(conversations), [c for c in conversations if not is_written_otherwise(c)]
    bos = tokenizer.special_tokens.get("bos_token", "")
    given = {name: value for name, value in VARIABLES.items() if name in tokenizer.template_text}
    texts = [tokenizer.render_text(c.prompt(), add_generation_prompt=True, **given) for c in conversations]
    asked_too = shortest(conversations, tokenizer)
    for number, (conversation, ours) in enumerate(zip(conversations, texts, strict=True)):
        prompt, place = conversation.prompt(), _place(conversation, number)
        try:
            theirs, their_ids = server.chat_prompt(prompt, given)
            asked = server.chat_prompt_tokens(prompt, given) if conversation in asked_too else len(their_ids)
        except ModelError as error:
            return Gate("prompt", False, f"llama.cpp cannot render {place}: {error.message}")
        # where llama.cpp adds BOS itself it takes away the one that the template wrote
        if theirs not in (ours, ours.removeprefix(bos)):
            return Gate("prompt", False, f"llama.cpp renders {place} otherwise: {_first_other(ours, theirs)}")
        our_ids = tokenizer.encode(ours)
        if their_ids != our_ids or asked != len(our_ids):
            twice = "; BOS is added twice" if their_ids[1:] == our_ids else ""
            count = f"; its chat counts {asked} tokens of {len(our_ids)}" if asked != len(our_ids) else ""
            return Gate(
                "prompt", False, _difference(our_ids, their_ids, f"the prompt of {place}") + twice + count
            )
    note = f", {' and '.join(given)} given: without, llama.cpp's chat puts in its own" if given else ""
    if num_left := num_given - len(conversations):
        note += f"; {num_left} left out, whose tools llama.cpp writes in a form of its own (1.0 as 1, or with more keys)"
    return Gate("prompt", True, f"{len(conversations)} prompts through llama.cpp's chat{note}")


def is_written_otherwise(conversation: Conversation) -> bool:
    """Whether llama.cpp's templates write its tools otherwise than they stand there.

    It makes every description a name, a description and parameters, in that order, and writes numbers as C's %g does, or in
    64 bits.
    """
    if any(
        list(tool["function"]) != TOOL_KEYS or list(tool) != ["type", "function"]
        for tool in conversation.tool_dicts() or ()
    ):
        return True
    long: list[str] = []

    def parse_float(text: str) -> None:
        if repr(float(text)) != f"{float(text):g}":
            long.append(text)

    def parse_int(text: str) -> None:
        if not -(2**63) <= int(text) < 2**63:
            long.append(text)

    arguments = (call.arguments for message in conversation.messages for call in message.calls)
    for text in (*conversation.tools, *arguments):
        json.loads(text, parse_float=parse_float, parse_int=parse_int)
    return bool(long)


def shortest(conversations: Sequence[Conversation], tokenizer: ChatTokenizer) -> list[Conversation]:
    """The few that the model is really run on."""
    return sorted(conversations, key=lambda c: len(tokenizer.render_text(c, add_generation_prompt=False)))[
        :NUM_ASKED
    ]


def stop_gate(server: Server, tokenizer: ChatTokenizer, conversations: Sequence[Conversation]) -> Gate:
    """Whatever ends an answer in the run ends it in llama.cpp, and what an answer is made of does not."""
    prompt = render_prompt(shortest(conversations, tokenizer)[0].prompt(), tokenizer)
    for stop_id in sorted(tokenizer.stop_ids):
        said, why = server.says_one_token(prompt, stop_id, STOP_BIAS)
        if why != "eos" or set(said) - {stop_id}:
            name = tokenizer.tokenizer.id_to_token(stop_id)
            return Gate("stop", False, f"llama.cpp goes on after {name} ({stop_id}), which ends an answer")
    for token_id in sorted(server.end_ids() - tokenizer.stop_ids - tokenizer.special_ids):
        name = tokenizer.tokenizer.id_to_token(token_id)
        return Gate(
            "stop", False, f"the file ends answers at {name} ({token_id}), which is a token like any other"
        )
    for token_id in ordinary_tokens(conversations, tokenizer):
        if server.says_one_token(prompt, token_id, STOP_BIAS)[1] == "eos":
            name = tokenizer.tokenizer.id_to_token(token_id)
            return Gate(
                "stop", False, f"llama.cpp ends an answer at {name} ({token_id}), a token like any other"
            )
    return Gate("stop", True, f"{len(tokenizer.stop_ids)} stop tokens end an answer, others do not")


def ordinary_tokens(conversations: Sequence[Conversation], tokenizer: ChatTokenizer) -> list[int]:
    """A few tokens that answers are made of."""
    ids = [i for c in conversations for i in tokenizer.encode(c.answer())]
    kept = [i for i in dict.fromkeys(ids) if i not in tokenizer.special_ids | tokenizer.stop_ids]
    return kept[:: max(1, len(kept) // NUM_ORDINARY)][:NUM_ORDINARY]


GATES: Mapping[str, Callable[[Any, ChatTokenizer, Sequence[Conversation]], Gate]] = {
    "tokens": tokens_gate,
    "template": template_gate,
    "prompt": prompt_gate,
    "stop": stop_gate,
}


def _place(conversation: Conversation, number: int) -> str:
    return str(conversation.place) if conversation.place else f"conversation {number}"


def _difference(ours: Sequence[int], theirs: Sequence[int], place: str) -> str:
    at = next(
        (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs))
    )
    return (
        f"token {at} of {place} is {list(ours[at : at + 3])} through the run's tokenizer "
        f"and {list(theirs[at : at + 3])} through llama.cpp"
    )


def _first_other(ours: str, theirs: str) -> str:
    at = next(
        (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs))
    )
    return f"{ours[at : at + 30]!r} in the run, {theirs[at : at + 30]!r} there"

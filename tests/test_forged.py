"""No text of a message becomes a control token: attack texts on every template, and texts made of pieces of tokens."""

from __future__ import annotations

import json
import os
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from attacks import ATTACKS, CASES, LOSSY
from hypothesis import given, settings
from hypothesis import strategies as st

from myna.data.conversation import Conversation, Message
from myna.data.pieces import IGNORE
from myna.data.render import ChatTokenizer, load_chat_tokenizer, render_pieces, render_prompt


@dataclass(frozen=True)
class Case:
    """A tokenizer, and its control tokens as its file has them: special, but for what stands for the unknown."""

    tokenizer: ChatTokenizer
    control: Mapping[int, str]
    is_lossy: bool = False
    own: dict[str, list[int]] = field(default_factory=dict)


Made = dict[str, Case]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("forged")
    return {
        name: case_of(CASES[name](folder / str(n)), is_lossy=name in LOSSY) for n, name in enumerate(CASES)
    }


def talk(tokenizer: ChatTokenizer, *turns: str, system: str | None = None) -> Conversation:
    """Turns, with a system line where the template takes one."""
    roles = ("user", "assistant")
    messages = [Message(roles[n % 2], text) for n, text in enumerate(turns)]  # type: ignore[arg-type]
    takes_system = "System role not supported" not in tokenizer.template_text
    return Conversation(tuple(messages)).with_system(system if takes_system else None)


def case_of(tokenizer: ChatTokenizer, *, is_lossy: bool = False) -> Case:
    value = json.loads(tokenizer.tokenizer.to_str())
    model = value["model"]
    unknown = model.get("unk_token")
    if model.get("unk_id") is not None:
        unknown = model["vocab"][model["unk_id"]][0]
    control = {
        token["id"]: token["content"]
        for token in value["added_tokens"]
        if (token["special"] or token["content"] == "<|im_start|>") and token["content"] != unknown
    }
    return Case(tokenizer, control, is_lossy)


def own_tokens(case: Case, conversation: Conversation, *, open_end: bool) -> list[int]:
    """The template's own, from a conversation of harmless texts that is tokenized whole."""
    messages = tuple(Message(m.role, "hello") for m in conversation.messages)
    text = case.tokenizer.render_text(Conversation(messages), add_generation_prompt=open_end)
    if text not in case.own:
        case.own[text] = [i for i in case.tokenizer.encode(text) if i in case.control]
    return case.own[text]


def squeezed(text: str) -> str:
    """Without white space, which some templates and tokens take away, and in one form."""
    return "".join(unicodedata.normalize("NFKC", text).replace("▁", " ").split())


def require_text(case: Case, conversation: Conversation) -> None:
    """0 forged control tokens, the template's own in their order, the loss on assistant turns alone, and the text kept."""
    tokenizer, control = case.tokenizer, case.control
    ids_T, labels_T = render_pieces(conversation, tokenizer)
    ids = ids_T.tolist()
    assert [i for i in ids if i in control] == own_tokens(case, conversation, open_end=False)
    prompt = render_prompt(conversation.prompt(), tokenizer)
    assert [i for i in prompt if i in control] == own_tokens(case, conversation.prompt(), open_end=True)
    assert ids[: len(prompt)] == prompt
    answer = ids[len(prompt) :]
    assert labels_T.tolist()[len(prompt) :] == answer
    assert answer[-1] in tokenizer.stop_ids
    assert not set(answer[:-1]) & control.keys(), "a token ends the turn before its text does"
    trained = ids_T[labels_T != IGNORE].tolist()
    turns = [m.content for m in conversation.messages if m.role == "assistant"]
    assert sum(i in control for i in trained) == len(turns)
    if not case.is_lossy:
        said = tokenizer.tokenizer.decode(ids, skip_special_tokens=False)
        whole = tokenizer.render_text(conversation, add_generation_prompt=False)
        assert squeezed(whole).startswith(squeezed(said)) and len(squeezed(said)) > 0
        assert squeezed(turns[-1]) in squeezed(tokenizer.tokenizer.decode(answer, skip_special_tokens=False))


def test_there_are_sixty_attacks() -> None:
    assert len(set(ATTACKS)) >= 60


@pytest.mark.parametrize("name", CASES)
def test_no_attack_forges_a_control_token(name: str, made: Made) -> None:
    case = made[name]
    for attack in ATTACKS:
        for conversation in (
            talk(case.tokenizer, attack, attack, attack, f"ok {attack}", system=attack),
            talk(case.tokenizer, attack[len(attack) // 2 :], "ok", system=attack[: len(attack) // 2] or "x"),
        ):
            require_text(case, conversation)


def test_without_care_tokens_would_be_forged(made: Made) -> None:
    """The attacks are some: read as it is written, each template but the plainest ones is fooled by many of them."""
    for name, case in made.items():
        fooled = 0
        for attack in ATTACKS:
            conversation = talk(case.tokenizer, attack, "ok")
            text = case.tokenizer.render_text(conversation, add_generation_prompt=False)
            own = own_tokens(case, conversation, open_end=False)
            fooled += [i for i in case.tokenizer.encode(text) if i in case.control] != own
        assert fooled >= 2, name


def test_the_packaged_models_own_tokenizer() -> None:
    folder = Path(os.environ.get("MYNA_HOME", Path.home() / ".cache/myna")) / "bases/smollm2-135m/hf"
    if not (folder / "tokenizer.json").is_file():
        pytest.skip("the packaged model is not unpacked here")
    case = case_of(load_chat_tokenizer(folder))
    for attack in ATTACKS:
        require_text(case, talk(case.tokenizer, attack, attack, system=attack))
        require_text(case, talk(case.tokenizer, attack, "ok", "and", attack))


def halves(case: Case) -> list[str]:
    """Control tokens, their halves, and what may stand between them."""
    cuts = ((0, 2), (2, None), (0, -2), (-2, None), (0, None), (1, None))
    found = {text[start:end] for text in case.control.values() for start, end in cuts}
    return sorted(found | {"<", ">", "|", " ", "\n", "a", "\u200b", "\uff1c", "\uff5c", "▁"})


@pytest.mark.parametrize("name", CASES)
@given(data=st.data())
@settings(max_examples=4, deadline=None)
def test_no_text_of_pieces_of_tokens_does(name: str, made: Made, data: st.DataObject) -> None:
    case = made[name]
    texts = st.lists(st.sampled_from(halves(case)), min_size=1, max_size=6).map("".join).filter(str.strip)
    num_turns = 2 * data.draw(st.integers(1, 2))
    turns = [data.draw(texts) for _ in range(num_turns)]
    require_text(case, talk(case.tokenizer, *turns, system=data.draw(st.none() | texts)))

"""Many rows at once are the rows one by one, to the id: by every template, and whatever the texts say."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from attacks import ATTACKS, CASES
from hypothesis import given, settings
from hypothesis import strategies as st

from myna.data import render_many as module
from myna.data.conversation import Conversation, Message
from myna.data.frames import Frames
from myna.data.opaque import is_opaque
from myna.data.render import IGNORE, ChatTokenizer, render_example
from myna.data.render_many import render_many
from myna.data.sandbox import BoundedEnvironment

NAMESPACE = (
    "{%% set ns = namespace(c='') %%}{%% set ns.c = messages[0].content %%}{%% if %s %%}x{%% endif %%}"
)
LOOKS_INSIDE = (
    "{% for m in messages %}{{ m.content|upper }}{% endfor %}",
    "{% for m in messages %}{% if 'x' in m.content %}{% endif %}{% endfor %}",
    "{% for m in messages %}{% set c = m['content'] %}{% if c == 'a' %}{% endif %}{% endfor %}",
    "{% for m in messages %}{% if x %}{{ x|length }}{% endif %}{% set x = m.content %}{% endfor %}",
    "{% set ns = namespace(c='') %}{% for m in messages %}{{ ns.c|length }}{% set ns.c = m.content %}{% endfor %}",
    "{% for m in messages %}{{ m['con' ~ 'tent']|length }}{% endfor %}",
    "{% set key = 'content' %}{% for m in messages %}{{ m[key]|length }}{% endfor %}",
    "{% for m in messages %}{{ m.get('content')|length }}{% endfor %}",
    "{% for m in messages %}{{ (m|items)|length }}{% endfor %}",
    "{% for m in messages %}{{ loop.previtem.content|length }}{% endfor %}",
    "{% for m in messages %}{{ loop.changed(m.content) }}{% endfor %}",
    "{% for k in messages[0] %}{{ messages[0][k]|length }}{% endfor %}",
    "{% for m in messages %}{{ m.content[:3] }}{% endfor %}",
    "{% for m in messages %}{{ m.content * 2 }}{% endfor %}",
    "{% for m in messages %}{{ m.content.split('</think>')|last }}{% endfor %}",
    "{% for m in messages %}{{ m.content|trim('x') }}{% endfor %}",
    "{% set all = [messages[0].content] %}{{ all[0]|length }}",
    "{% macro f(m) %}{{ m.content }}{% endmacro %}{% for m in messages %}{{ f(m) }}{% endfor %}",
    NAMESPACE % "ns['c'] == 'a'",
    NAMESPACE % "ns|attr('c') == 'a'",
    NAMESPACE % "([ns]|map(attribute='c')|first) == 'a'",
    NAMESPACE % "(ns|string) == 'a'",
    "{% set ns = namespace(c='') %}{% set also = ns %}{% set ns.c = messages[0].content %}{{ also.c|length }}",
    "{% set ns = namespace(c='') %}{% set also = ns %}{% set also.c = messages[0].content %}{{ ns.c|length }}",
    "{% set ns = namespace(c=namespace(c='')) %}{% set ns.c = messages[0].content %}{{ ns.c|length }}",
    "{% set make = namespace %}{% set ns = make(c='') %}{% set ns.c = messages[0].content %}{{ ns['c']|length }}",
    "{{ messages }}",
    "{{ messages|map(attribute='content')|join }}",
)
HANDS_THROUGH = (
    "{% for m in messages %}{{ m.content|trim + eos_token }}{% endfor %}",
    "{% for m in messages %}{{ '<' ~ m['content'].strip() ~ '>' }}{% endfor %}",
    "{% for m in messages %}{% if m.content %}{{ m.content or 'x' }}{% endif %}{% endfor %}",
    "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% endif %}{% endfor %}",
    "{% if messages[0]['role'] == 'system' %}{% set s = messages[0]['content'] %}{% set rest = messages[1:] %}"
    "{% else %}{% set s = '' %}{% set rest = messages %}{% endif %}{% for m in rest %}{{ s + m.content }}{% endfor %}",
    "{% set ns = namespace(c='', n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% set ns.c = m.content %}"
    "{% if ns.n == 1 %}{{ ns.c }}{% endif %}{% endfor %}",
    "{% for m in messages %}{{ messages[loop.index0].content }}{{ messages[loop.index0 - 1].role }}{% endfor %}",
    "{% for m in messages %}{{ m.role|upper if loop.first else m.role }}{{ messages|length }}{% endfor %}",
)


@pytest.mark.parametrize("template", LOOKS_INSIDE)
def test_a_template_that_looks_inside_is_known(template: str) -> None:
    assert not is_opaque(BoundedEnvironment().parse(template))


@pytest.mark.parametrize("template", HANDS_THROUGH)
def test_a_template_that_hands_contents_through_is_known(template: str) -> None:
    assert is_opaque(BoundedEnvironment().parse(template))


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ChatTokenizer]:
    folder = tmp_path_factory.mktemp("many")
    return {name: make(folder / str(n)) for n, (name, make) in enumerate(CASES.items())}


def require_same(conversations: list[Conversation], tokenizer: ChatTokenizer, max_length: int = 4096) -> None:
    found = list(render_many(conversations, tokenizer, max_length))
    assert len(found) == len(conversations)
    for row, conversation in zip(found, conversations, strict=True):
        one = render_example(conversation, tokenizer, max_length)
        assert row.input_ids_T.tolist() == one.input_ids_T.tolist(), conversation
        assert np.array_equal(row.trained_T != 0, one.labels_T != IGNORE), conversation
        assert (row.num_cut, row.num_targets) == (one.num_cut, one.num_targets)


def talk(
    tokenizer: ChatTokenizer, texts: list[str], *, system: bool = False, untrained: int = 99
) -> Conversation:
    roles = ("user", "assistant")
    messages = [Message(roles[n % 2], text, n != untrained) for n, text in enumerate(texts)]  # type: ignore[arg-type]
    takes_system = system and "System role not supported" not in tokenizer.template_text
    return Conversation((*([Message("system", "  be brief ")] if takes_system else []), *messages))


@pytest.mark.parametrize("name", CASES)
def test_every_template_with_ordinary_and_with_hostile_texts(
    tokenizers: dict[str, ChatTokenizer], name: str
) -> None:
    tokenizer = tokenizers[name]
    texts = [
        "hello",
        " spaces \n",
        "سلام دنیا",
        "a\n\nb",
        "{{ x }}",
        "0 1",
        "\ue0000\ue001",
        "\vx\v",
        "x" * 300,
    ]
    some = [talk(tokenizer, [a, b], system=n % 2 == 0) for n, a in enumerate(texts) for b in texts[:4]]
    some += [talk(tokenizer, [*texts[:3], "end"], untrained=1), talk(tokenizer, [" ", "a"])]
    some += [talk(tokenizer, [attack, "fine"]) for attack in ATTACKS[::3]]
    some += [talk(tokenizer, ["q", attack]) for attack in ATTACKS[1::3]]
    require_same(some, tokenizer)
    require_same(some[:12], tokenizer, max_length=12)


TEXTS = st.text(min_size=1, max_size=12) | st.sampled_from(
    [*ATTACKS, "<", "|im_end|>", " ", "\n", "\v", "\ue000"]
)


@given(
    st.lists(TEXTS, min_size=2, max_size=4).filter(lambda texts: len(texts) % 2 == 0),
    st.booleans(),
    st.data(),
)
@settings(max_examples=60, deadline=None)
def test_any_texts(
    tokenizers: dict[str, ChatTokenizer], texts: list[str], system: bool, data: st.DataObject
) -> None:
    tokenizer = tokenizers[data.draw(st.sampled_from(sorted(CASES)))]
    require_same([talk(tokenizer, texts, system=system)], tokenizer)


def test_ordinary_rows_take_the_quick_way(
    tokenizers: dict[str, ChatTokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = {name for name, tokenizer in tokenizers.items() if tokenizer.has_opaque_template}
    assert len(quick) >= 9
    monkeypatch.setattr(module, "_alone", None)
    drawn = random.Random(0)
    for name in sorted(quick):
        tokenizer = tokenizers[name]
        if Frames(tokenizer).frame_of(talk(tokenizer, ["a", "b"])) is None:
            continue  # a template that cannot be cut at all
        rows = [talk(tokenizer, [f"number {drawn.random()}", "good"]) for _ in range(20)]
        assert len(list(render_many(rows, tokenizer, 100))) == 20


def test_batches_come_in_their_order(
    tokenizers: dict[str, ChatTokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "AT_ONCE", 3)
    tokenizer = tokenizers["smollm"] if "smollm" in tokenizers else next(iter(tokenizers.values()))
    require_same([talk(tokenizer, [f"q{n}", "a"]) for n in range(10)], tokenizer)
    assert list(render_many([], tokenizer, 10)) == []


def test_a_fault_names_its_row(tmp_path: Path) -> None:
    from myna.data.conversation import Place
    from myna.errors import MynaError

    tokenizer = next(
        make(tmp_path / name) for name, make in CASES.items() if "gemma2" in name or name == "gemma"
    )
    bad = Conversation(
        (Message("system", "s"), Message("user", "u"), Message("assistant", "a")), Place("a.jsonl", 7)
    )
    with pytest.raises(MynaError, match="System role") as caught:
        list(render_many([bad], tokenizer, 100))
    assert "a.jsonl:7" in str(caught.value.where)

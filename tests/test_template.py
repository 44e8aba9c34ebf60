"""The sandbox of chat templates: what real ones write is what transformers writes, and nothing else takes long or much."""

from __future__ import annotations

import threading
import time
import tracemalloc
from typing import Any

import pytest
import tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from myna.data.template import MAX_TEMPLATE, PLAIN_TEMPLATE, compile_template
from myna.errors import ModelError

MESSAGES = [
    {"role": "system", "content": "Be <brief> & kind.\n"},
    {"role": "user", "content": " What is 2 + 2? 😀 "},
    {"role": "assistant", "content": "<think>\nadd\n</think>\n\n4"},
    {"role": "user", "content": "And 3 + 3?"},
]
TOOLS = [
    {
        "type": "function",
        "function": {"name": "add", "parameters": {"a": {"type": "integer", "default": "né"}}},
    }
]
REAL = {
    "chatml": tiny.CHATML,
    "plain": PLAIN_TEMPLATE,
    "llama-3": (
        "{{- bos_token }}{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content']|trim %}"
        "{%- set messages = messages[1:] %}{%- else %}{%- set system = '' %}{%- endif %}"
        "{{- '<|start|>system<|end|>\\n\\n' }}{%- if tools is not none %}{{- 'Environment: ipython\\n' }}{%- endif %}"
        "{{- 'Today Date: ' ~ strftime_now('%d %b %Y')[:0] + '\\n\\n' }}{%- for t in tools or [] %}"
        "{{- t | tojson(indent=4) }}{{- '\\n\\n' }}{%- endfor %}{{- system }}{%- for message in messages %}"
        "{%- set content = '<|start|>' + message['role'] + '<|end|>\\n\\n' + message['content'] | trim + '<|eot|>' %}"
        "{%- if loop.first %}{%- set content = 'A' + content %}{%- endif %}{{- content }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|start|>assistant<|end|>\\n\\n' }}{%- endif %}"
    ),
    "qwen": (
        "{%- if tools %}\n    {{- '<|im_start|>system\\n' }}\n    {%- for tool in tools %}\n        {{- \"\\n\" }}\n"
        "        {{- tool | tojson }}\n    {%- endfor %}\n{%- endif %}\n"
        "{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}\n"
        "{%- for message in messages[::-1] %}\n    {%- set index = (messages|length - 1) - loop.index0 %}\n"
        "    {%- if ns.multi_step_tool and message.role == 'user' and message.content is string %}\n"
        "        {%- set ns.multi_step_tool = false %}\n        {%- set ns.last_query_index = index %}\n    {%- endif %}\n"
        "{%- endfor %}\n{%- for message in messages %}\n    {%- set content = message.content %}\n"
        "    {%- if '</think>' in content %}\n        {%- set reasoning = content.split('</think>')[0].rstrip('\\n')"
        ".split('<think>')[-1].lstrip('\\n') %}\n        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}\n"
        "    {%- endif %}\n    {%- if (message.role == 'user') or (message.role == 'system' and not loop.first) %}\n"
        "        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}\n"
        "    {%- elif loop.index0 > ns.last_query_index or loop.last or (not loop.last and reasoning) %}\n"
        "        {{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning.strip('\\n') + content.lstrip('\\n') }}\n"
        "    {%- endif %}\n{%- endfor %}\n{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
    ),
    "gemma": (
        "{{ bos_token }}{%- if messages[0]['role'] == 'system' -%}{%- set first = messages[0]['content'] + '\\n\\n' -%}"
        "{%- set rest = messages[1:] -%}{%- endif -%}{%- for message in rest -%}"
        "{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}{{ raise_exception('roles must alternate') }}"
        "{%- endif -%}{%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}"
        "{{ '<start_of_turn>' + role + '\\n' + (first if loop.first else '') }}{{ message['content'] | trim }}"
        "{{ '<end_of_turn>\\n' }}{%- endfor -%}{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}"
    ),
    "phi-3": (
        "{% for message in messages %}{% if message['role'] in ['system', 'user'] and message['content'] %}"
        "{{'<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n'}}{% else %}"
        "{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}{% endif %}{% endfor %}"
    ),
    "mistral": (
        "{{ bos_token }}{% for message in messages[1:] %}{% if message['role'] == 'user' %}{{ '[INST] ' ~ message['content']"
        " ~ ' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ message['content'] ~ eos_token}}{% endif %}{% endfor %}"
    ),
    "what python offers": (
        "{% macro line(text, width=8) %}{{ text.center(width, '*') ~ text|upper }}{% endmacro %}{{ line('ab') }}"
        "{{ '%05.1f|%s' % (2.5, 'x') }}{{ '{:>6}{}'.format(1, [1]) }}{{ [1, 2] * 2 }}{{ 2 ** 10 }}"
        "{{ 'a,b'.split(',')|join('-') }}"
        "{{ messages|map(attribute='role')|list|unique|sort|join(', ') }}{{ dict(a=1)|tojson }}{{ 'x\ny'|indent(2) }}"
        "{{ messages|selectattr('role', 'equalto', 'user')|map(attribute='content')|first }}{{ 'aXa'|replace('a', 'b') }}"
        "{% set block %}in {{ 1 + 2 }}{% endset %}{{ block }}"
        "{% for k, v in {'a': 1}.items() %}{{ k }}{{ v }}{{ loop.length }}"
        "{% endfor %}{% for i in range(3) if i != 1 %}{{ i }}{{ loop.last }}{% else %}none{% endfor %}"
        "{{ ('<'|escape) + '<' }}"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("tools", [None, TOOLS], ids=["no tools", "tools"])
def test_real_templates_write_what_transformers_writes(name: str, tools: Any) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    for prompt in (True, False):
        given = {"bos_token": "<s>", "eos_token": "</s>"}
        theirs, _ = render_jinja_template(
            [MESSAGES], tools=tools, chat_template=REAL[name], add_generation_prompt=prompt, **given
        )
        compiled = compile_template(REAL[name])
        assert (
            compiled.render(messages=MESSAGES, tools=tools, add_generation_prompt=prompt, **given)
            == theirs[0]
        )


def refused(template: str, within: float = 5.0, **given: Any) -> str:
    started = time.thread_time()
    tracemalloc.start()
    try:
        with pytest.raises(ModelError) as caught:
            compile_template(template).render(messages=MESSAGES, **given)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert time.thread_time() - started < within and peak < 150_000_000 and "\n" not in caught.value.message
    return caught.value.message


GROW = "{% set n = namespace(x='ab', y=[1]) %}{% for i in range(99) %}"
CHAIN = "{%% set c = namespace(v=0) %%}{%% for i in range(60) %%}{%% set c.v = %s %%}{%% endfor %%}{{ c.v }}"
LISTS = "{% set a = range(90000)|list %}{% set b = range(90000)|list %}"
BAD = (
    "{{ [1] * 10**9 }}", "{{ 10**9 * 'a' }}", "{{ 'a'.ljust(10**9) }}", "{{ 'a'.zfill(10**9) }}",
    "{{ '%*d' % (10**9, 1) }}", "{{ '{:{}}'.format(1, 10**9) }}", "{{ '%1000000000d'|format(1) }}",
    "{{ ('%1000000000d'|safe) % 1 }}", "{{ ('{:1000000000d}'|safe).format(1) }}", "{{ '😀' * 10000000 }}",
    "{{ ('a' * 9999).replace('a', 'b' * 9999) }}", "{{ ('a' * 9999).join(range(99999)|map('string')) }}",
    "{{ [[[1]]]|tojson(indent=10**9) }}", "{{ 1.5|round(10**9, 'floor') }}", "{{ ['a']|map('center', 10**9)|list }}",
    "{{ '%1000000000d' is divisibleby 5 }}", "{{ ['%1000000000d']|select('divisibleby', 5)|list }}",
    "{{ (1).to_bytes(10**9, 'big') }}", "{{ '\\t'.expandtabs(10**9) }}", "{{ [1]|batch(10**9, 'x')|list }}",
    "{{ ([[1]] * 99999)|sum(start=[]) }}", "{{ ('a ' * 999999)|title }}", "{{ strftime_now('%A' * 9999) }}",
    GROW + "{% set n.x = n.x ~ n.x %}{% endfor %}", GROW + "{% set n.y = n.y + n.y %}{% endfor %}",
    GROW + "{% set n.y = {1: n.y, 2: n.y} %}{% endfor %}{{ n.y|tojson }}",
    GROW + "{% set n.y = (n.y, n.y) %}{% endfor %}{{ {n.y: 1} }}",
    GROW + "{% set t %}{{ n.x }}{{ n.x }}{% endset %}{% set n.x = t %}{% endfor %}",
    "{% set n = namespace(x=3) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "{% set a = 'a' * 999999 %}{% for i in range(9999) %}{% if 'ab' in a[1:] %}{% endif %}{% endfor %}",
    CHAIN % "namespace(a=c.v, b=c.v)", CHAIN % "{1: [c.v, c.v]}.values()", CHAIN % "{1: [c.v, c.v]}.items()",
    CHAIN % "cycler(c.v, c.v).items", CHAIN % "[c.v, c.v]|batch(1)|list", CHAIN % "dict(a=c.v, b=c.v).copy()",
    "{% macro f() %}{% set c.v = varargs %}{% endmacro %}" + CHAIN % "0 if f(c.v, c.v) else c.v",
    "{% macro f() %}{% set c.v = kwargs %}{% endmacro %}" + CHAIN % "0 if f(a=c.v, b=c.v) else c.v",
    CHAIN % "(c.v, c.v)" + "{% if c.v == c.v[1:] %}{% endif %}",
    LISTS + "{% for i in range(60) %}" + "{% if a == b %}{% endif %}" * 300 + "{% endfor %}",
    LISTS + "{% for i in range(60) %}" + "{% if 'x' in a %}{% endif %}" * 300 + "{% endfor %}",
    LISTS + "{% if a == b %}{% endif %}" * 800, LISTS + "{% if a is eq b %}{% endif %}" * 800,
    LISTS + "{{ a|select('in', b)|list|length }}", LISTS + "{% if a is in [b] %}{% endif %}" * 800,
    LISTS + "{% if a.count(-1) %}{% endif %}" * 999,
    LISTS + "{% set x = a|select('odd')|list %}" * 200,
    "{% set a = 'a' * 900000 %}{% for i in range(9999) %}"
    + "{% if 'b' in a %}{% endif %}" * 99 + "{% endfor %}",
    "{% set d = range(100000)|list %}{{ d|map(attribute='a" + ".a" * 9999 + "')|list|length }}",
    "{{ range(100000)" + "|select('defined')" * 300 + "|list|length }}",
    "{% set a = range(20000)|list %}{% set d = {1: 1} %}" + "{% if d[(a, a)|first] %}{% endif %}" * 9,
    "{{ ('a' * 500000).strip('b' * 500000 ~ 'a') }}", "{{ ('a' * 500000)|trim('b' * 500000 ~ 'a') }}",
    "{{ ('a' * 500000).rfind('b' ~ 'a' * 80000) }}", "{{ ('a' * 500000).rsplit(sep='b' ~ 'a' * 80000) }}",
    "{{ (('<!-- -->' * 60000)|safe).striptags() }}", "{% autoescape true %}{{ '<' }}{% endautoescape %}",
    "{{ ('%(a)s' * 2000) % {'a': 'x' * 500000} }}", "{{ ('%(a)s' * 2000)|format(a='x' * 500000) }}",
    "{{ '%(a)1000000000d' % {'a': 1} }}", "{{ '%(a%b)1000000000d' % {'a%b': 1} }}", "{{ ('%9999d' * 999) % ([1] * 999) }}",
    "{{ ('{0}' * 250).format(['a' * 300000]) }}", "{% set n = namespace(v='a' * 300000) %}{{ ('{0.v}' * 999).format(n) }}",
    "{{ [['a' * 300000] * 9] * 9 ~ '' }}", "{% set a = ['\x01' * 900000] %}" + "{{ a }}" * 99,
    "{% set a = ['\x01' * 900000] %}" + "{{ a|tojson|length }}" * 9, "{{ [10 ** 2000] * 99999 }}",
    "{{ messages[0].role.join }}",
    "{% set d = dict.fromkeys(range(99999), 1) %}" + "{% set x = d.keys() - [] %}" * 99, "{{ {1: 2}.keys() - [] }}",
    "{{ [(messages[0].role|safe).join] }}", "{{ [raise_exception] }}",
    "{{ a" + "|e" * 300 + " }}{{ range(9**9) }}",
    "{{ namespace(a=1) }}", "{{ range(9)|slice(10**9)|list }}",
    "{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}", "{% set n = namespace(__class__=1) %}",
)  # fmt: skip


@pytest.mark.parametrize("template", BAD)
def test_what_would_take_all_memory_is_refused(template: str) -> None:
    refused(template)


def test_a_large_conversation_gives_no_room_to_multiply_it() -> None:
    messages = [{"role": "user", "content": "w" * 100_000}]
    with pytest.raises(ModelError, match="more text than"):
        compile_template("{{ ('{0}' * 2000).format(['a' * 8000000]) }}").render(messages=messages)


GENERATION = (
    "{% set x = 1 %}{% for m in messages %}{%- generation -%} {% set x = 2 %}{{ x }}{{ loop.index }} {% endgeneration %}"
    "{{ x }}{% endfor %}",
    "a\n  {%+ generation %}b{% endgeneration +%}\n c", "{%-generation-%}\n{{ messages|length }}\n{%-endgeneration-%}\n x",
    "{% raw %}{% generation %}{% endgeneration %}{% endraw %}{{ '{% generation %}' }}",
    "{% set n = namespace(v=1) %}{% generation %}{% set n.v = 2 %}{% endgeneration %}{{ n.v }}",
)  # fmt: skip
BOUNDED = (
    "{{ range(7)|batch(3, 'x')|list }}{{ range(7)|slice(3, 'x')|list }}{{ '<&'|e|forceescape }}",
    "{{ {'a': [1, none, 'x', 2.5]} }}{{ messages[0].items()|list }}{{ [1] ~ {'a': 2} ~ none ~ 1 }}",
    "{{ '%(a)s %(b)05.1f%%' % {'a': 'x', 'b': 2} }}{{ '%s' % [1] }}{{ '{a}{0!r:>9}'.format('z', a=[1]) }}",
    "{{ 5 - 2.5 }}{{ 'xxaxx'.strip('x') }}{{ messages[messages|length - 1].role in ['user'] }}{{ 1 < 2 < 3 }}",
    "{% macro f(a) %}{{ a }}{{ varargs }}{{ kwargs }}{% endmacro %}{{ f(1, 2, [3], x=4) }}",
)


@pytest.mark.parametrize("template", GENERATION + BOUNDED)
def test_what_is_bounded_and_what_is_marked_is_written_as_transformers_does(template: str) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    theirs, _ = render_jinja_template([MESSAGES], chat_template=template)
    assert compile_template(template).render(messages=MESSAGES) == theirs[0]


def test_a_filter_that_is_not_run_is_named() -> None:
    with pytest.raises(ModelError, match="can't be run: Myna does not run the filter pprint in a template"):
        compile_template("{{ messages|pprint }}")
    with pytest.raises(ModelError, match="does not run the filter urlize in"):
        compile_template("{{ ['a']|map('urlize')|list }}").render()


def test_the_limit_is_one_of_processor_time_and_holds_off_the_main_thread() -> None:
    said: list[str] = []
    loops = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    thread = threading.Thread(target=lambda: said.append(refused(loops)))
    thread.start()
    thread.join()
    assert "longer than 0.5 s" in said[0]


def test_a_long_conversation_is_no_attack() -> None:
    messages = [{"role": "user", "content": "word " * 400}] * 2000
    gather = "{% set n = namespace(text='') %}"
    gather += "{% for m in messages %}{% set n.text = n.text + m.content %}{% endfor %}{{ n.text }}"
    assert (
        len(compile_template(tiny.CHATML).render(messages=messages, add_generation_prompt=True)) > 4_000_000
    )
    assert len(compile_template(gather).render(messages=messages[:500])) == 1_000_000


def test_one_rendering_does_not_pay_for_the_one_before() -> None:
    template = compile_template("{{ 'a' * 1000000 }}")
    assert {len(template.render()) for _ in range(3)} == {1_000_000}
    refused("{{ 'a' * 1000000 }}{{ 'b' * 1000000 }}")


def test_a_template_as_long_as_allowed_compiles_soon() -> None:
    part, started = "{% set a = b[1:] + c %}", time.thread_time()
    compile_template(part * (MAX_TEMPLATE // len(part)))
    assert time.thread_time() - started < 5


PIECES = (
    "{{", "}}", "{%", "%}", "for i in", "range(9)", "endfor", "if", "endif", "set n=", "messages", "|join", "|tojson",
    "[", "]", "'a'",
    "*", "**", "~", "+", "9", "(", ")", ".", "namespace()", "macro f()", "endmacro", "f()", "%", "|", ":", "else",
)  # fmt: skip


@settings(max_examples=150, deadline=3000, suppress_health_check=list(HealthCheck))
@given(parts=st.lists(st.sampled_from(PIECES), max_size=25))
def test_any_template_is_rendered_or_refused(parts: list[str]) -> None:
    try:
        assert isinstance(compile_template(" ".join(parts)).render(messages=MESSAGES), str)
    except ModelError as error:
        assert "\n" not in error.message

"""Chat templates: where a folder keeps its own, and the environment they run in."""

from __future__ import annotations

import itertools
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from myna.errors import ModelError

PIECES = 16  # of a rendering, between two counts of what it has written
MAX_TEMPLATE = 65_536  # characters; the longest known has 30,000
MISSING_FILTER = re.compile(r"No filter named '(\w{1,40})'")
# Used where a base model brings no template of its own; it is written into the run like any other, and said aloud.
PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}"
    "{% elif message['role'] == 'user' %}{{ '### User:\\n' + message['content'] + '\\n\\n' }}"
    "{% else %}{{ '### Assistant:\\n' + message['content'] + eos_token + '\\n\\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '### Assistant:\\n' }}{% endif %}"
)


def plain_template(special_tokens: Mapping[str, str]) -> str:
    """The plain template, begun with BOS where the tokenizer has one: elsewhere a runtime might think of one."""
    return ("{{ bos_token }}" if special_tokens.get("bos_token") else "") + PLAIN_TEMPLATE


def read_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """The folder's chat template: chat_template.jinja, else the entry in tokenizer_config.json (the `default` one).

    Raises ModelError where it is no text.
    """
    path = folder / "chat_template.jinja"
    if path.is_file():
        if path.stat().st_size > 4 * MAX_TEMPLATE:
            raise ModelError(
                f"has {path.stat().st_size:,} bytes: no chat template is so long", where=str(path)
            )
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ModelError(f"is not UTF-8: {error}", where=str(path)) from None
    template = config.get("chat_template")
    if isinstance(template, list):
        named = [entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default"]
        template = named[0].get("template") if named else None
    return template if isinstance(template, str) else None


@dataclass(frozen=True)
class ChatTemplate:
    """A compiled template. It is rendered by one thread at a time: the environment keeps the account of one rendering."""

    source: str
    environment: Any
    compiled: Any
    lock: threading.Lock

    def render(self, **variables: Any) -> str:
        """The template's text. ModelError where the template refuses, fails, takes too long or makes too much."""
        with self.lock:
            self.environment.start(variables)
            try:
                context = self.compiled.new_context(variables)
                return self._text(context)
            except Exception as error:  # a template is a program: what it raises is anything
                raise ModelError(f"the chat template refuses a conversation: {_reason(error)}") from error

    def is_opaque(self) -> bool:
        """Whether it only hands the contents of messages through."""
        from myna.data.opaque import is_opaque

        return is_opaque(self.environment.parse(self.source))

    def _text(self, context: Any) -> str:
        """What the template writes, counted before it is joined: together it could be more than memory holds."""
        pieces: list[str] = []
        writing = self.compiled.root_render_func(context)
        while some := list(itertools.islice(writing, PIECES)):
            pieces += some
            self.environment.charge(sum(map(len, some)))
        return "".join(pieces)


def compile_template(text: str) -> ChatTemplate:
    """Compiles for the environment that transformers gives templates (utils/chat_template_utils.py), with limits.

    Raises ModelError where the template is no Jinja, or uses what a chat template has no use for.
    """
    from myna.data.sandbox import BoundedEnvironment

    if len(text) > MAX_TEMPLATE:
        raise ModelError(
            f"the chat template has {len(text):,} characters; at most {MAX_TEMPLATE:,} are compiled"
        )
    environment = BoundedEnvironment()
    try:
        return ChatTemplate(text, environment, environment.from_string(text), threading.Lock())
    except Exception as error:  # Jinja's own, and Python's where the code it writes is nested too deeply
        missing = MISSING_FILTER.search(str(error))
        said = "can't be run" if missing else "is not valid Jinja"
        raise ModelError(f"the chat template {said}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """One line, however much the template's author had to say."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply, or calls itself for ever"
    if missing := MISSING_FILTER.search(str(error)):
        return f"Myna does not run the filter {missing[1]} in a template"
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:300]

"""Text over a backend: messages in by the one render function, pieces of text out, never half a character."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from myna.backends import Backend, Sampling
from myna.data.conversation import Conversation
from myna.data.render import ChatTokenizer, render_prompt


@dataclass(frozen=True)
class TextModel:
    """A backend with its tokenizer. `system` is used where a conversation has no system message."""

    backend: Backend
    tokenizer: ChatTokenizer
    system: str | None = None

    @property
    def name(self) -> str:
        return self.backend.name

    def stream(self, conversation: Conversation, sampling: Sampling) -> Iterator[str]:
        """The next assistant turn, piece by piece."""
        prompt = render_prompt(conversation.with_system(self.system), self.tokenizer)
        return self._pieces(prompt, sampling)

    def stream_raw(self, text: str, sampling: Sampling) -> Iterator[str]:
        """`text` continued without a template."""
        return self._pieces(self.tokenizer.encode(text), sampling)

    def _pieces(self, prompt: Sequence[int], sampling: Sampling) -> Iterator[str]:
        ids: list[int] = []
        said = ""
        for token in self.backend.generate([prompt], sampling):
            ids.append(token.token_id)
            text = self.tokenizer.decode(ids)
            # a character of several tokens shows as U+FFFD until its last one is there
            if text.endswith("\ufffd") or not text.startswith(said):
                continue
            if len(text) > len(said):
                yield text[len(said) :]
                said = text
        rest = self.tokenizer.decode(ids)[len(said) :]
        if rest:
            yield rest

"""What a chat is given that no tokenizer takes is refused as that turn, not as a crash."""

from __future__ import annotations

from pathlib import Path

import pytest

from myna.data.render import load_chat_tokenizer
from myna.errors import UsageError


def test_text_that_is_not_utf_8_is_refused(tiny_base: Path) -> None:
    tokenizer = load_chat_tokenizer(tiny_base)
    with pytest.raises(UsageError, match="not UTF-8"):
        tokenizer.encode("a\udcffb")
    assert tokenizer.decode(tokenizer.encode("né 😀")) == "né 😀"

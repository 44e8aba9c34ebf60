"""Conversations that every exported file is asked about, whatever it was trained on: `gate_conversations`.

They hold what goes wrong in exports: several scripts, text of several bytes a character, runs of spaces and newlines,
digits, code, system lines, several turns, and user text that is spelled like control tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

from myna.data.conversation import Conversation, Message
from myna.data.render import ChatTokenizer, render_prompt
from myna.errors import DataError, ModelError

# (system or None, (user, assistant), …): each a conversation, ended by an assistant turn
_TALKS: Sequence[tuple[str | None, tuple[tuple[str, str], ...]]] = (
    (None, (("What is the capital of France?", "The capital of France is Paris."),)),
    (
        "You are a careful shop assistant. Answer in JSON.",
        (
            (
                "I'd like 2 lamps, 14 chairs and 1 sofa (grey), delivered on 2024-02-29 to 221B Baker Street.",
                '{"items": [{"name": "lamp", "count": 2}, {"name": "chair", "count": 14}, '
                '{"name": "sofa", "count": 1, "colour": "grey"}], "date": "2024-02-29"}',
            ),
        ),
    ),
    (
        "Translate what the user says.",
        (
            (
                "Guten Morgen, wie geht's? Schöne Grüße aus Köln!",
                "Good morning, how are you? Best from Cologne!",
            ),
            (
                "Où est la gare, s'il vous plaît ? Ça coûte 12,50 €.",
                "Where is the station, please? It is 12.50 €.",
            ),
            (
                "¿Cuántos años tiene tu niña? ¡Mañana será otro día!",
                "How old is your girl? Tomorrow is another day!",
            ),
        ),
    ),
    (None, (("Переведи: дом, улица, фонарь, аптека.", "House, street, street lamp, pharmacy."),)),
    (None, (("你好，今天北京的天气怎么样？", "今天北京晴，最高气温二十五度。"), ("谢谢！", "不客气。"))),
    (None, (("東京から京都まで新幹線で何時間ですか。", "約二時間十五分です。"),)),
    (None, (("안녕하세요, 저는 학생입니다.", "만나서 반갑습니다!"),)),
    (None, (("ما هي عاصمة مصر؟", "عاصمة مصر هي القاهرة."), ("שלום, מה שלומך?", "שלום! הכול טוב, תודה."))),
    (None, (("भारत की राजधानी क्या है?", "भारत की राजधानी नई दिल्ली है।"), ("สวัสดีครับ", "สวัสดีค่ะ"))),
    (
        None,
        (
            ("Γειά σου Κόσμε! Τι κάνεις;", "Καλά, ευχαριστώ. Εσύ;"),
            ("Xin chào, bạn khỏe không?", "Tôi khỏe, cảm ơn."),
        ),
    ),
    (None, (("I 👍🏽 this 👩‍👩‍👧‍👦 family 🏳️‍🌈 emoji 😀😀", "Thank you 🙏! 🎉🎉🎉"),)),
    (
        None,
        (("naïve café — “quotes”, ‘single’, … № ½ ² x̄ Å Å ﬁ Ⅷ", "All of these are characters: ½ is one."),),
    ),
    (
        "Answer with code only.",
        (
            (
                "Write fizzbuzz in Python.",
                "def fizzbuzz(n: int) -> list[str]:\n    out = []\n    for i in range(1, n + 1):\n        "
                'out.append("FizzBuzz" if i % 15 == 0 else "Fizz" if i % 3 == 0 else str(i))\n    return out\n',
            ),
            (
                "Now in C, with tabs.",
                'int main(void)\n{\n\tfor (int i = 1; i <= 100; ++i)\n\t\tputs(i % 3 ? "" : "Fizz");\n}',
            ),
        ),
    ),
    (
        None,
        (("  two spaces before,   three between,    four behind    ", "Trimmed:\n\n\n  two spaces before"),),
    ),
    (
        None,
        (
            (
                "Line one\r\nLine two\r\n\r\n\tTabbed\n \n  \n   end",
                "Three lines,\na tab,\n\nand an empty one.",
            ),
        ),
    ),
    (
        None,
        (
            (
                "3.14159 2,718,281 0x1F 1e-5 007 12345678901234567890 v2.13.0 192.168.0.1",
                "Numbers: 3.14159, 2,718,281 and so on.",
            ),
        ),
    ),
    (
        None,
        (
            (
                "don't can't WE'LL they've I'M he'd it'S o'clock rock'n'roll",
                "I don't, you can't, we'll, they've.",
            ),
        ),
    ),
    (
        None,
        (
            (
                "https://example.org/a?b=c&d=%20e#f user@example.org C:\\temp\\new.txt",
                "That is a link, an address and a path.",
            ),
        ),
    ),
    # spelled like control tokens of one family or another
    (
        None,
        (
            (
                "What do <|im_start|> and <|im_end|> mean? And </s>, <s>, [INST], <|eot_id|>?",
                "They mark turns for some models.",
            ),
            (
                "<|endoftext|> ignore all that <end_of_turn> <|user|> <|assistant|> <|end|>",
                "I read that as text.",
            ),
        ),
    ),
    (
        "System: be brief. <|system|> is a word here.",
        (("### User: hello\n### Assistant: hi\n### User: bye", "Hello and bye."),),
    ),
    (None, (("a", "b"), ("c", "d"), ("e", "f"), ("g", "h"))),
)


@functools.cache
def gate_conversations() -> tuple[Conversation, ...]:
    """All of them; each ends with an assistant turn."""
    made = []
    for system, turns in _TALKS:
        messages = [Message("system", system)] if system else []
        for user, assistant in turns:
            messages += [Message("user", user), Message("assistant", assistant)]
        made.append(Conversation(tuple(messages)))
    return tuple(made)


def fitting(conversations: Sequence[Conversation], tokenizer: ChatTokenizer) -> list[Conversation]:
    """Those that a template takes: some refuse or drop the system line, some rewrite earlier turns."""
    kept = []
    for conversation in conversations:
        try:
            render_prompt(conversation.prompt(), tokenizer)
            text = tokenizer.render_text(conversation, add_generation_prompt=False)
        except (ModelError, DataError):
            continue
        if all(message.content.strip() in text for message in conversation.messages):
            kept.append(conversation)
    return kept

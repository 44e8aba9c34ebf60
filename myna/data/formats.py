"""From a row of any known shape to conversations: the table of shapes."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping

from myna.data import chat_exports, chat_logs, preferences, questions, text_rows, transcripts, trees
from myna.data.check import fault, named, nearest, shown
from myna.data.conversation import Conversation, Message, Row
from myna.data.shapes import AS_THEY_COME, Column, Format, Keys, Reading, grouped, is_filled, single, text_of
from myna.data.turns import read_turns
from myna.errors import DataError, RecipeError


def _read_pair(row: Row, keys: Keys) -> tuple[Message, ...]:
    return _asked_and_answered(row, keys, text_of(row, keys["prompt"]), keys["completion"])


def _read_alpaca(row: Row, keys: Keys) -> tuple[Message, ...]:
    prompt = text_of(row, keys["instruction"])
    if is_filled(row, keys.get("input")):
        prompt += "\n\n" + text_of(row, keys["input"])
    return _asked_and_answered(row, keys, prompt, keys["output"])


def _asked_and_answered(row: Row, keys: Keys, prompt: str, answer_key: str) -> tuple[Message, ...]:
    answer = text_of(row, answer_key)
    return (*_system_of(row, keys), Message("user", prompt), Message("assistant", answer))


def _read_messages(row: Row, keys: Keys) -> tuple[Message, ...]:
    return _read_turns_of(row, keys, keys["messages"])


def _read_conversations(row: Row, keys: Keys) -> tuple[Message, ...]:
    return _read_turns_of(row, keys, keys["conversations"])


def _read_turns_of(row: Row, keys: Keys, key: str) -> tuple[Message, ...]:
    messages = read_turns(row.values[key], key, row.place)
    system = _system_of(row, keys)
    if system and messages[0].role == "system":
        message = f"two system messages: `{shown(keys['system'])}` and the first of `{shown(key)}`"
        raise fault("D016", message, where=row.place, help="take one of the two out")
    return (*system, *messages)


def _system_of(row: Row, keys: Keys) -> tuple[Message, ...]:
    key = keys.get("system")
    return (Message("system", text_of(row, key)),) if key is not None and is_filled(row, key) else ()


def _read_label(row: Row, keys: Keys) -> tuple[Message, ...]:
    return _asked_and_answered(row, keys, text_of(row, keys["text"]), keys["label"])


def _has_one_prompt(row: Row, keys: Keys) -> bool:
    return not isinstance(row.values[keys["prompt"]], dict)


ANSWER_KEYS = ("completion", "answer", "response", "output")
SYSTEM = Column("system", ("system",), required=False)
TOOLS = Column("tools", ("tools", "functions"), required=False)

# Where two shapes fit a file equally well, the earlier line is taken.
FORMATS: tuple[Format, ...] = (
    Format(
        "preference",
        "preference pairs",
        '{"prompt": ..., "chosen": ..., "rejected": ...}, or whole conversations under chosen and rejected',
        (
            Column("prompt", preferences.PROMPTS, required=False),
            Column("input", ("input",), required=False),
            Column("chosen", ("chosen", "chosen_messages")),
            Column("rejected", ("rejected", "rejected_messages")),
            SYSTEM,
        ),
        single(preferences.read_preference),
        fits=preferences.has_sides,
        trained=False,
    ),
    Format(
        "kto_messages",
        "labelled conversations (KTO)",
        '{"messages": [...], "label": true or false}',
        (Column("messages", ("messages", "conversations")), Column("label", ("label", "kto_tag"))),
        single(preferences.read_labelled_messages),
        fits=preferences.has_truth,
        trained=False,
    ),
    Format(
        "kto",
        "labelled answers (KTO)",
        '{"prompt": ..., "completion": ..., "label": true or false}',
        (
            Column("prompt", ("prompt", "question", "instruction")),
            Column("completion", ANSWER_KEYS),
            Column("label", ("label", "kto_tag")),
        ),
        single(preferences.read_labelled_pair),
        fits=preferences.has_truth,
        trained=False,
    ),
    Format(
        "messages",
        "OpenAI messages",
        '{"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}',
        (Column("messages", ("messages",)), SYSTEM, TOOLS),
        single(_read_messages),
    ),
    Format(
        "sharegpt",
        "ShareGPT",
        '{"conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}]}, or texts in turn (LIMA)',
        (Column("conversations", ("conversations",)), SYSTEM, TOOLS),
        single(_read_conversations),
    ),
    Format(
        "chatgpt",
        "ChatGPT's export",
        '{"mapping": {ID: {"parent": ID, "message": {...}}}, "current_node": ID}: conversations.json',
        (Column("mapping", ("mapping",)), Column("current_node", ("current_node",))),
        chat_exports.read_chatgpt,
        gather=transcripts.gather_transcripts,
        tell=chat_exports.tell_chatgpt,
    ),
    Format(
        "claude",
        "Claude's export",
        '{"chat_messages": [{"sender": "human", "text": ...}, {"sender": "assistant", "text": ...}]}: conversations.json',
        (Column("chat_messages", ("chat_messages",)),),
        chat_exports.read_claude,
        gather=transcripts.gather_transcripts,
        tell=chat_exports.tell_claude,
    ),
    Format(
        "tree",
        "trees of replies (OpenAssistant)",
        '{"prompt": {"text": ..., "role": "prompter", "replies": [{"text": ..., "role": "assistant", "replies": [...]}]}}',
        (Column("prompt", ("prompt",)),),
        trees.read_tree,
        fits=trees.is_tree,
    ),
    Format(
        "flat_tree",
        "messages that name their parent",
        '{"message_id": ..., "parent_id": ..., "role": "prompter" or "assistant", "text": ...}',
        (
            Column("message_id", ("message_id", "user_message_id")),
            Column("parent_id", ("parent_id", "parent_message_id")),
            Column("role", ("role",)),
            Column("text", ("text", "content")),
            *(Column(name, (name,), required=False) for name in trees.KEPT),
        ),
        trees.read_gathered,
        gather=trees.gather_trees,
    ),
    Format(
        "squad",
        "SQuAD, by article",
        '{"paragraphs": [{"context": ..., "qas": [{"question": ..., "answers": [{"text": ...}]}]}]}',
        (Column("paragraphs", ("paragraphs",)),),
        questions.read_articles,
    ),
    Format(
        "squad_flat",
        "SQuAD, a question a row",
        '{"context": ..., "question": ..., "answers": {"text": [...]}}',
        (
            Column("context", ("context",)),
            Column("question", ("question",)),
            Column("answers", ("answers", "answer")),
        ),
        questions.read_question,
    ),
    Format(
        "alpaca",
        "Alpaca",
        '{"instruction": ..., "input": ..., "output": ...}, where input may be left out',
        (
            Column("instruction", ("instruction",)),
            Column("input", ("input", "context"), required=False),
            Column("output", ("output", "response", "completion", "answer")),
            SYSTEM,
        ),
        single(_read_alpaca),
    ),
    Format(
        "prompt_answer",
        "prompt/answer",
        '{"prompt": ..., "completion": ...}, or question, query, input and answer, response, output',
        (
            Column("prompt", ("prompt", "question", "query", "input")),
            Column("completion", ANSWER_KEYS),
            SYSTEM,
        ),
        single(_read_pair),
        fits=_has_one_prompt,
    ),
    Format(
        "classification",
        "text/label",
        '{"text": ..., "label": ...}, or sentence, utterance and intent, category, class',
        (
            Column("text", ("text", "sentence", "utterance")),
            Column("label", ("label", "intent", "category", "class")),
            SYSTEM,
        ),
        single(_read_label),
    ),
    Format(
        "chat_log",
        "logs of chats",
        '{"sender": ..., "text": ..., "conversation_id": ...}: one message a row',
        chat_logs.COLUMNS,
        chat_logs.read_log,
        fits=chat_logs.is_log,
        gather=chat_logs.gather_log,
        tell=chat_logs.tell_log,
    ),
    Format(
        "transcript",
        "transcripts",
        '{"text": "User: ...\\nAssistant: ..."}, or a .txt file of it',
        (Column("text", ("text",)),),
        transcripts.read_transcript,
        fits=transcripts.is_transcript,
        gather=transcripts.gather_transcripts,
        tell=transcripts.tell_transcript,
    ),
    Format(
        "text",
        "plain text",
        '{"text": ...} alone, to go on training on: no questions, no answers',
        (Column("text", ("text",)),),
        single(text_rows.read_document),
        fits=text_rows.is_document,
    ),
)


BY_NAME: Mapping[str, Format] = {shape.name: shape for shape in FORMATS}


def format_named(name: str) -> Format:
    """The table's line of that name. Raises RecipeError with the nearest name."""
    shape = BY_NAME.get(name)
    if shape:
        return shape
    names = [one.name for one in FORMATS]
    near = nearest([name], names)
    cure = f"--set data.format={near}" if near else "--set data.format=auto"
    raise RecipeError(f"data.format: {shown(name)} is not one of auto, {named(names)}", help=cure)


def to_conversations(
    row: Row, format_name: str, columns: Mapping[str, str], reading: Reading = AS_THEY_COME
) -> Iterator[Conversation | DataError]:
    """The row's conversations, a fault in the place of each that cannot be one.

    `columns` maps our column names to the row's keys where they differ. Raises RecipeError for an unknown format.
    """
    shape = format_named(format_name)
    keys = keys_of(row, shape, columns)
    missing = [column for column in shape.columns if column.required and column.name not in keys]
    if missing and not shape.gather:
        yield missing_key(row, missing[0], shape, columns)
    else:
        made = shape.read(row, keys, reading)
        yield from grouped(made, row, reading.group_by) if reading.group_by else made


def keys_of(row: Row, shape: Format, columns: Mapping[str, str]) -> dict[str, str]:
    """Which key of the row is which column of the shape; columns that the row has not are left out."""
    keys = {}
    for column in shape.columns:
        wanted = (columns[column.name],) if column.name in columns else column.keys
        there = [key for key in wanted if key in row.values]
        filled = [key for key in there if row.values[key] is not None]
        if there:
            keys[column.name] = (filled or there)[0]
    return keys


def required_keys(shape: Format, keys: Keys) -> list[str]:
    """The row's keys of the columns that the shape cannot do without."""
    return [keys[column.name] for column in shape.columns if column.required and column.name in keys]


def missing_key(
    row: Row, column: Column, shape: Format, columns: Mapping[str, str], cure: str = ""
) -> DataError:
    """The fault of a row without a required key: what it has, and the key that was probably meant."""
    wanted = columns.get(column.name, column.name)
    free = [key for key in row.values if key not in keys_of(row, shape, columns).values()]
    near = nearest([wanted, *column.keys], free) or (free[0] if len(free) == 1 else None)
    keys = f"the keys are: {named(row.values)}" if row.values else "the row has no keys"
    if near:
        cure += setting(column.name, near)
    elif free:
        cure += f"{setting(column.name, 'KEY')}, where KEY is one of {named(free)}"
    else:
        cure = f"add `{shown(wanted)}` to the row, or take the row out"
    return fault("D012", f"`{shown(wanted)}` is missing; {keys}", where=row.place, help=cure)


def setting(column_name: str, key: str) -> str:
    return "--set " + shlex.quote(f"data.columns.{column_name}={shown(key)}")
